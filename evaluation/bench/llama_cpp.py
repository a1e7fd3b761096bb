"""The same vectors from llama.cpp, as fast as its C API gives them: a baseline to measure ourselves against.

llama.cpp has no soft tokens, so it computes the states, and numpy the soft-token embedding that comes next::

    llama_decode(prompt)                     -> logits of the last token of each text
    K times: softmax(logits / T) @ E         in numpy, FP32
             llama_decode(embeddings = that) -> h_k and the logits of the next step
    z_K = normalized mean of h_1..h_K, or normalized h_K

One call runs all texts of a batch, each as its own sequence. The prompt asks for logits only: a llama.cpp context that
returns states returns them, and logits, for every token. It offers no states without logits, so the last step's
projection onto the vocabulary is wasted.
"""

import ctypes
import functools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gircse.runtime.errors import CheckpointError, OptionError, ProviderError
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, Int64, l2_normalize

BASELINE_ENVIRONMENT = {"OPENBLAS_THREAD_TIMEOUT": "4", "GOMP_SPINCOUNT": "10000"}
"""For the process that runs the baseline, from its start. Idle threads of numpy's OpenBLAS and of llama.cpp's OpenMP
spin by default, each on the cores that the other needs: 447 ms instead of 183 for one text of 24 tokens, K = 8, with
the demo on two cores of a Xeon without use of AMX."""

CRASH_HINT = (
    "Some versions of GCC, such as 12.2, miscompile llama.cpp's AMX setup (ggml-org/llama.cpp#20824). To avoid it: "
    "CMAKE_ARGS=-DCMAKE_CXX_FLAGS=-fno-dse pip install --force-reinstall --no-cache-dir llama-cpp-python"
)
"""What to do when the process dies in llama.cpp, which no code of ours can catch."""

_GGML_LOG_LEVEL_ERROR = 4
_errors: list[str] = []
"""What llama.cpp has reported since the current call began, the cause first."""


class LlamaCppBaseline:
    """A GGUF model held open on the CPU; a context manager. Not for several threads at a time."""

    def __init__(
        self,
        gguf: Path,
        *,
        embedding_table: Float32,
        batch: int,
        tokens: int,
        steps: int,
        threads: int,
        temperature: float = 1.0,
        pooling: Pooling = Pooling.MEAN,
        repack: bool = True,
    ) -> None:
        """Load the model and allocate for the largest batch.

        Args:
            gguf: the model's GGUF file.
            embedding_table: (vocabulary, hidden) float32, E.
            batch: maximum texts of one run.
            tokens: longest prompt.
            steps: largest K.
            threads: threads of llama.cpp; numpy's BLAS has its own setting (``OPENBLAS_NUM_THREADS``).
            temperature: T.
            pooling: what becomes of h_1..h_K.
            repack: let llama.cpp lay its weights out for this CPU, its default. Without it AMX is not used.

        Raises:
            CheckpointError: llama.cpp cannot load the file, or it is of another model than the table.
            ProviderError: llama-cpp-python is missing, or there is not enough memory.
        """
        self._lib = _llama_cpp()
        self._shape, self._steps = (batch, tokens), steps
        self._temperature, self._pooling = temperature, pooling
        self._table = np.ascontiguousarray(embedding_table, dtype=np.float32)
        with ExitStack() as opened:
            model = _open_model(self._lib, gguf, repack=repack)
            opened.callback(self._lib.llama_model_free, model)
            _check_same_model(self._lib, model, self._table, gguf)
            context = _open_context(self._lib, model, batch=batch, tokens=tokens, room=tokens + steps, threads=threads)
            opened.callback(self._lib.llama_free, context)
            self._context, self._opened = context, opened.pop_all()
        self._weights = np.empty((batch, len(self._table)), np.float32)

    def run(self, input_ids: Int64, *, steps: int) -> Float32:
        """Embed texts of equal length.

        Args:
            input_ids: (batch, tokens) int64, no padding.
            steps: K, at least 1.

        Returns:
            (batch, hidden) float32, z_K.

        Raises:
            OptionError: more texts, tokens or steps than there is room for, or none.
            ValueError: the baseline is closed.
            ProviderError: llama.cpp fails.
        """
        self._check_fits(input_ids, steps)
        lib, (batch, tokens) = self._lib, input_ids.shape
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        lib.llama_set_embeddings(self._context, False)
        _decode(lib, self._context, _Batch(lib, input_ids.astype(np.int32).ravel(), sequences=batch))
        lib.llama_set_embeddings(self._context, True)
        soft_tokens = np.empty((batch, self._table.shape[1]), np.float32)
        pooled = np.zeros_like(soft_tokens)
        step = _Batch(lib, soft_tokens, sequences=batch)
        for k in range(steps):
            self._mix(self._rows(lib.llama_get_logits, (batch, len(self._table))), out=soft_tokens)
            step.positions[:] = tokens + k
            _decode(lib, self._context, step)
            if self._pooling is Pooling.MEAN or k == steps - 1:
                pooled += self._rows(lib.llama_get_embeddings, pooled.shape)
        return l2_normalize(pooled)  # the sum has the direction of the mean

    def close(self) -> None:
        """Free the context and the model; closing twice does nothing."""
        self._context = None
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_fits(self, input_ids: Int64, steps: int) -> None:
        if self._context is None:
            raise ValueError("the llama.cpp baseline is closed")
        fits = input_ids.ndim == 2 and 0 < input_ids.size and np.less_equal(input_ids.shape, self._shape).all()
        if not fits or not 1 <= steps <= self._steps:
            raise OptionError(
                "input_ids",
                f"has shape {input_ids.shape}, for {steps} steps",
                f"this baseline takes shapes up to {self._shape} and 1 to {self._steps} steps",
                "Open the baseline with more room.",
            )

    def _rows(self, getter: Callable[[Any], Any], shape: tuple[int, ...]) -> Float32:
        """View llama.cpp's output, which the next decode overwrites."""
        rows: Float32 = np.ctypeslib.as_array(getter(self._context), shape)
        return rows

    def _mix(self, logits: Float32, *, out: Float32) -> None:
        """Write softmax(logits / T) @ E, divided by the sum at the end: hidden divisions instead of vocabulary ones."""
        weights = self._weights[: len(logits)]
        np.subtract(logits, logits.max(axis=1, keepdims=True), out=weights)
        if self._temperature != 1.0:
            weights /= np.float32(self._temperature)
        np.exp(weights, out=weights)
        np.matmul(weights, self._table, out=out)
        out /= weights.sum(axis=1, keepdims=True)


class _Batch:
    """A ``llama_batch`` over numpy arrays, which it keeps alive; the last token of each sequence gives an output."""

    def __init__(self, lib: Any, values: NDArray[Any], *, sequences: int) -> None:
        """Take (sequences * tokens) int32 token ids or (sequences * tokens, hidden) float32 embeddings."""
        count, tokens = len(values), len(values) // sequences
        self.positions = np.tile(np.arange(tokens, dtype=np.int32), sequences)
        ones = np.ones(count, np.int32)
        ids = np.repeat(np.arange(sequences, dtype=np.int32), tokens)
        id_pointers = (ids.ctypes.data + ids.itemsize * np.arange(count)).astype(np.uintp)
        outputs = np.zeros(count, np.int8)
        outputs[tokens - 1 :: tokens] = 1
        self._alive = (values, ones, ids, id_pointers, outputs)
        int32, kind = ctypes.c_int32, "token" if values.ndim == 1 else "embd"
        self.struct = lib.llama_batch(
            n_tokens=count,
            pos=_pointer(self.positions, int32),
            n_seq_id=_pointer(ones, int32),
            seq_id=_pointer(id_pointers, ctypes.POINTER(int32)),
            logits=_pointer(outputs, ctypes.c_int8),
            **{kind: _pointer(values, int32 if kind == "token" else ctypes.c_float)},
        )


@functools.cache
def _llama_cpp() -> Any:
    """Import llama-cpp-python and start llama.cpp, silent except for the error that our messages repeat."""
    try:
        import llama_cpp
    except ImportError as err:
        raise ProviderError(
            "llama-cpp-python", "is not installed", None, "Install it: pip install 'gircse-deploy[llama-cpp]'"
        ) from err
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache  # llama.cpp keeps no reference to it
def _log_callback(llama_cpp: Any) -> Any:
    def keep_error(level: int, text: bytes, _: Any) -> None:
        if level == _GGML_LOG_LEVEL_ERROR:
            _errors.append(text.decode(errors="replace").strip())

    return llama_cpp.llama_log_callback(keep_error)


def _open_model(lib: Any, gguf: Path, *, repack: bool) -> Any:
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = repack
    _errors.clear()
    model = lib.llama_model_load_from_file(str(gguf).encode(), params)
    if not model:
        raise CheckpointError(
            str(gguf), f"cannot be loaded by llama.cpp: {_reason('no message')}", None, "Check --gguf."
        )
    return model


def _check_same_model(lib: Any, model: Any, table: Float32, gguf: Path) -> None:
    found = (lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), lib.llama_model_n_embd(model))
    if found != table.shape:
        raise CheckpointError(
            str(gguf),
            f"has vocabulary and hidden size {found}",
            f"the embedding table has {table.shape}",
            "Pass the GGUF file of the same model.",
        )


def _open_context(lib: Any, model: Any, *, batch: int, tokens: int, room: int, threads: int) -> Any:
    """Open a context of ``batch`` sequences with a KV cache of ``room`` positions each, which llama.cpp rounds up."""
    params = lib.llama_context_default_params()
    params.n_ctx = batch * room
    params.n_batch = batch * tokens
    params.n_ubatch = min(params.n_batch, params.n_ubatch)
    params.n_seq_max = params.n_outputs_max = batch
    params.n_threads = params.n_threads_batch = threads
    params.pooling_type = lib.LLAMA_POOLING_TYPE_NONE
    params.offload_kqv = params.op_offload = params.kv_unified = False
    _errors.clear()
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise ProviderError(
            "llama.cpp",
            f"opens no context for {batch} x {room} tokens: {_reason('no message')}",
            None,
            "Choose a smaller batch, or use a machine with more memory.",
        )
    return context


def _decode(lib: Any, context: Any, batch: _Batch) -> None:
    _errors.clear()
    code = lib.llama_decode(context, batch.struct)
    if code:
        raise ProviderError(
            "llama.cpp",
            f"failed: llama_decode gave {code} ({_reason('no message')})",
            None,
            "Check the token ids and the GGUF file.",
        )


def _reason(otherwise: str) -> str:
    return _errors[0] if _errors else otherwise


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
