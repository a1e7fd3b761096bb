"""OpenAI's embeddings API: what a request may say, and how it is answered.

https://platform.openai.com/docs/api-reference/embeddings. A field that is null counts as absent: LiteLLM sends
``"encoding_format": null``. Fields that are not known are refused, because they would ask for other vectors.
"""

import base64
import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from gircse.runtime import Embedder, OptionError, Overflow
from gircse.runtime.numerics import Float32, l2_normalize
from gircse.runtime.tokenization import truncate
from gircse.serving.api_errors import ApiError
from gircse.serving.batching import Texts

MAX_INPUTS = 2048
"""Texts of a request, as at OpenAI."""

TOKEN_IDS_REFUSED = (
    "input holds token ids, and those of another tokenizer would give wrong vectors. Send texts; LangChain's "
    "OpenAIEmbeddings does with check_embedding_ctx_length=False. A server with --accept-token-ids takes ids of the "
    "model's own tokenizer"
)


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The body of ``POST /v1/embeddings``; the fields from ``input_type`` on are ours.

    Attributes:
        input: a text or a list of them, or token ids.
        model: as ``GET /v1/models`` has it.
        encoding_format: ``float``, or ``base64`` for little-endian float32.
        dimensions: length of the vectors.
        user: ignored.
        input_type: ``query`` puts the bundle's query instruction before every text.
        instruction: put before every text.
        steps: refinement steps, 0 to K.
        all_steps: answer with the vectors of every step too.
        on_overflow: what to do with texts that are too long.
    """

    input: Any
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    input_type: Literal["query", "document"] | None = None
    instruction: str | None = None
    steps: int | None = None
    all_steps: bool | None = None
    on_overflow: Overflow | None = None


_decoder = msgspec.json.Decoder(EmbeddingRequest)


def parse_request(body: bytes) -> EmbeddingRequest:
    """Read a body.

    Raises:
        ApiError: it is not JSON, or has other fields or types.
    """
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as err:
        field = re.search(r"`\$\.(\w+)|field `(\w+)`", str(err))
        raise ApiError(400, str(err), param=field and (field[1] or field[2])) from err
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise ApiError(400, f"the body is not JSON: {err}") from err


@dataclass(frozen=True)
class Prepared:
    """The texts of a request as tokens.

    Attributes:
        texts: what to embed.
        cut: how many of them were too long and lost their end.
    """

    texts: Texts
    cut: int


class EmbeddingApi:
    """Prepares requests for one bundle, and answers them.

    Attributes:
        model: the name of the bundle in requests and answers.
    """

    def __init__(
        self, embedder: Embedder, model: str, *, accept_token_ids: bool = False, allow_dimensions: bool = False
    ) -> None:
        """Take an open bundle.

        Args:
            embedder: of the bundle.
            model: its name.
            accept_token_ids: take token ids of the bundle's own tokenizer as input.
            allow_dimensions: cut vectors to the ``dimensions`` of a request.
        """
        self.model = model
        self._embedder = embedder
        self._accept_token_ids, self._allow_dimensions = accept_token_ids, allow_dimensions

    def prepare(self, request: EmbeddingRequest) -> Prepared:
        """Check a request and tokenize its texts, which takes time for many.

        Raises:
            ApiError: it asks for what the bundle does not have, or a text cannot be embedded.
        """
        self._check(request)
        overflow = request.on_overflow or Overflow.TRUNCATE
        inputs = request.input if isinstance(request.input, list) else [request.input]
        if inputs and isinstance(inputs[0], (int, list)):
            return Prepared(*self._given_ids(inputs, request, overflow))
        instruction = request.instruction or ""
        if request.instruction is None and request.input_type == "query":
            instruction = self._embedder.manifest.query_instruction
        _check_count(inputs)
        try:
            token_ids, cut = self._embedder.tokenizer.tokenize(inputs, instruction=instruction, on_overflow=overflow)
        except (OptionError, TypeError) as err:
            raise _wrong_text(err) from err
        return Prepared(self._texts(request, token_ids, instruction), len(cut))

    def _check(self, request: EmbeddingRequest) -> None:
        most, hidden = self._embedder.steps, self._embedder.embedding_dimension
        if request.model not in (None, self.model):
            raise ApiError(404, f"the model here is {self.model}", param="model", code="model_not_found")
        if request.steps is not None and not 0 <= request.steps <= most:
            raise ApiError(400, f"steps is {request.steps}; the model has 0 to {most}", param="steps")
        if request.all_steps and request.steps == 0:
            raise ApiError(400, "all_steps has no step with steps 0", param="all_steps")
        if request.input_type == "document" and request.instruction:
            raise ApiError(400, "a document has no instruction", param="instruction")
        if request.dimensions is None or request.dimensions == hidden:
            return
        if not self._allow_dimensions:
            reason = f"the vectors have {hidden} dimensions, and a server cuts them only with --allow-dimensions"
            raise ApiError(400, reason, param="dimensions")
        if not 1 <= request.dimensions < hidden:
            raise ApiError(400, f"dimensions is {request.dimensions}; there are 1 to {hidden}", param="dimensions")

    def _texts(self, request: EmbeddingRequest, token_ids: list[list[int]], instruction: str = "") -> Texts:
        shared = self._embedder.tokenizer.instruction_tokens(token_ids, instruction=instruction)
        steps = self._embedder.steps if request.steps is None else request.steps
        return Texts(token_ids, steps, instruction, shared, bool(request.all_steps))

    def _given_ids(self, inputs: list[Any], request: EmbeddingRequest, overflow: Overflow) -> tuple[Texts, int]:
        """Return texts that came as token ids, whole prompts, and how many were cut."""
        if not self._accept_token_ids:
            raise ApiError(400, TOKEN_IDS_REFUSED, param="input")
        if request.instruction or request.input_type == "query":
            raise ApiError(400, "token ids are whole prompts and take no instruction", param="input")
        prompts = inputs if isinstance(inputs[0], list) else [inputs]
        _check_count(prompts)
        vocabulary = self._embedder.manifest.graph.vocab_size
        for at, ids in enumerate(prompts):
            known = isinstance(ids, list) and all(type(token) is int and 0 <= token < vocabulary for token in ids)
            if not known or not ids:
                raise ApiError(400, f"input[{at}] is no list of token ids from 0 to {vocabulary - 1}", param="input")
        tokenizer = self._embedder.tokenizer
        try:
            cut_prompts, cut = truncate(
                prompts, max_tokens=tokenizer.max_tokens, side=tokenizer.truncation_side, on_overflow=overflow
            )
        except OptionError as err:
            raise _wrong_text(err) from err
        return self._texts(request, cut_prompts), len(cut)

    def answer(self, request: EmbeddingRequest, prepared: Prepared, vectors: Float32) -> bytes:
        """Return the body of the response.

        Args:
            request: what was asked for.
            prepared: its texts.
            vectors: (texts, hidden) float32, or (texts, steps, hidden) with ``all_steps``.
        """
        if request.dimensions is not None:
            vectors = l2_normalize(vectors[..., : request.dimensions])
        encode = _base64 if request.encoding_format == "base64" else _floats
        data = []
        for index, vector in enumerate(vectors):
            item: dict[str, Any] = {"object": "embedding", "index": index, "embedding": encode(vector)}
            if request.all_steps:
                item |= {"embedding": encode(vector[-1]), "steps": [encode(step) for step in vector]}
            data.append(item)
        usage = {"prompt_tokens": prepared.texts.tokens, "total_tokens": prepared.texts.tokens}
        return msgspec.json.encode({"object": "list", "data": data, "model": self.model, "usage": usage})


def _check_count(texts: list[Any]) -> None:
    if not 1 <= len(texts) <= MAX_INPUTS:
        raise ApiError(400, f"there are {len(texts)} texts; a request has 1 to {MAX_INPUTS}", param="input")


def _wrong_text(err: Exception) -> ApiError:
    """Return what the tokenizer says of a text, which it names by its position."""
    return ApiError(400, str(err).replace("texts[", "input["), param="input")


def _base64(vector: Float32) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _floats(vector: Float32) -> list[float]:
    listed: list[float] = vector.tolist()
    return listed
