"""The tokenizer of a checkpoint is all of its tokenizer files, and what a bundle gets of it gives the same ids."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_loop import plain_embeddings, plain_states
from support.small_models import SmallModels, edit_manifest
from support.tokenizer_cases import CASES, DATA, write_case
from support.tolerances import SMALL_MODEL_MAX_DIFFERENCE
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from gircse.checkpoint.awkward_texts import TEXTS, awkward_texts
from gircse.checkpoint.source import resolve_checkpoint
from gircse.checkpoint.tokenizer import CheckpointTokenizer, open_checkpoint_tokenizer
from gircse.checkpoint.tokenizer_checks import adapter_note, check_serialized, difference_note
from gircse.evaluation.parity.references import checkpoint_token_ids
from gircse.evaluation.tasks.prompts import Prompt
from gircse.export.export_command import main
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime import BundleError, CheckpointError, Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import TokenizerKind, TruncationSide
from gircse.runtime.tokenization import open_tokenizer, parse_tokenizer

RECORDED = json.loads(CASES.read_text(encoding="utf-8"))
JSON, AUTO = TokenizerKind
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def byte_level(directory: Path, **config: Any) -> Path:
    return write_case({"base": "byte-level", "files": {"tokenizer_config.json": {**PLAIN, **config}}}, directory)


def sentencepiece(directory: Path, **files: Any) -> Path:
    return write_case({"base": "sentencepiece", "files": {"tokenizer_config.json": LLAMA, **files}}, directory)


def opened(directory: Path, kind: TokenizerKind = JSON, vocab_size: int = 520) -> CheckpointTokenizer:
    return open_checkpoint_tokenizer(directory, kind, vocab_size=vocab_size)


def serialized_ids(tokenizer: CheckpointTokenizer, texts: list[str]) -> list[list[int]]:
    """What any reader of the bundle's tokenizer.json computes."""
    encodings = Tokenizer.from_str(tokenizer.content).encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_json_gives_the_ids_that_transformers_4_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = opened(write_case(case, tmp_path / "checkpoint"))
    check_serialized(tokenizer)
    assert tokenizer.token_ids(RECORDED["texts"]) == case["ids"]
    assert serialized_ids(tokenizer, RECORDED["texts"]) == case["ids"]


def test_the_recorded_cases_differ_from_tokenizer_json_alone() -> None:
    """Else they prove nothing."""
    ids = {case["name"]: case["ids"] for case in RECORDED["cases"]}
    same = [name for name, found in ids.items() if found == ids["tokenizer.json alone"]]
    assert same == [
        "tokenizer.json alone",
        "special_tokens_map beside added_tokens_decoder",
        "add_prefix_space taken back",
        "add_prefix_space not given",
        "truncation and padding in tokenizer.json",
        "vocab.json and merges.txt",
    ]


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": None}], ids=["tokenizer.json", "tokenizer.model alone"])
def test_auto_gives_the_ids_of_auto_tokenizer(files: dict[str, Any], tmp_path: Path) -> None:
    directory = sentencepiece(tmp_path / "checkpoint", **files)
    theirs = AutoTokenizer.from_pretrained(directory)(list(TEXTS), add_special_tokens=False)["input_ids"]
    assert serialized_ids(opened(directory, AUTO), list(TEXTS)) == theirs
    assert serialized_ids(opened(directory), list(TEXTS)) != theirs  # transformers 5 rebuilds a LlamaTokenizer


def test_a_difference_between_the_kinds_is_one_line_with_an_example(tmp_path: Path) -> None:
    directory = sentencepiece(tmp_path / "llama")
    note = difference_note(opened(directory), vocab_size=520)
    assert note is not None
    assert "\n" not in note
    assert note.startswith("the token ids are those of --tokenizer json; --tokenizer auto gives others for ")
    assert "makes a LlamaTokenizer" in note
    reverse = difference_note(opened(directory, AUTO), vocab_size=520)
    assert reverse is not None
    assert reverse.startswith("the token ids are those of --tokenizer auto; --tokenizer json gives others for ")
    generic = byte_level(tmp_path / "generic", eos_token="<|end|>")
    (generic / "config.json").write_text('{"model_type": "llama"}')
    assert difference_note(opened(generic), vocab_size=520) is None


def test_an_auto_tokenizer_that_fails_is_one_line(tmp_path: Path) -> None:
    directory = byte_level(tmp_path, tokenizer_class="GPT2Tokenizer", add_prefix_space=None, eos_token="<|end|>")
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    note = difference_note(opened(directory), vocab_size=520)
    assert note is not None
    assert note.startswith("--tokenizer auto cannot be compared: The tokenizer of ")
    with pytest.raises(CheckpointError, match=r"^The tokenizer of .* cannot be used by transformers: "):
        opened(directory, AUTO)


def test_what_a_tokenizer_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    directory = byte_level(tmp_path, split_special_tokens=True)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json sets split_special_tokens; a tokenizer\.json"):
        opened(directory)


def test_a_serialized_tokenizer_with_other_ids_is_refused(tmp_path: Path) -> None:
    tokenizer = opened(byte_level(tmp_path, eos_token="<|end|>"))
    check_serialized(tokenizer)
    _ = tokenizer.content
    tokenizer.hugging_face.add_tokens([AddedToken("quick", normalized=False)])
    message = r"no tokenizer\.json can hold: '.*quick.*' becomes \[.*\]; .* of transformers gives \[.*\]\. Try --token"
    with pytest.raises(CheckpointError, match=message):
        check_serialized(tokenizer)


def test_a_tokenizer_without_a_token_for_everything_is_refused(tmp_path: Path) -> None:
    directory = byte_level(tmp_path)
    model = {"type": "WordLevel", "vocab": {"<|end|>": 0, "word": 1}, "unk_token": "[UNK]"}
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps({**tokenizer, "model": model}))
    with pytest.raises(CheckpointError, match=r"cannot be used by transformers: .*UNK.*\. Complete the checkpoint"):
        check_serialized(opened(directory))
    prompts = opened(directory).prompt_tokenizer(max_tokens=8)
    with pytest.raises(BundleError, match=r"^tokenizer\.json cannot tokenize a text: .*UNK"):
        prompts(["another"])


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    evil = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    directory = byte_level(tmp_path, auto_map=evil, tokenizer_class="EvilTokenizer")
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (directory / "config.json").write_text('{"model_type": "unknown-to-transformers", "eos_token_id": 0}')
    opened(directory)
    with pytest.raises(CheckpointError, match="cannot be used by transformers"):
        opened(directory, AUTO)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"512": 3}}'),
        ("tokenizer_config.json", '{"pad_token": 3}'),
        ("special_tokens_map.json", "{"),
        ("added_tokens.json", "[]"),
    ],
)
@pytest.mark.parametrize("kind", TokenizerKind)
def test_damaged_files_are_one_error(name: str, content: str, kind: TokenizerKind, tmp_path: Path) -> None:
    directory = byte_level(tmp_path)
    (directory / name).write_text(content)
    with pytest.raises(CheckpointError, match=str(directory)):
        opened(directory, kind)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    directory = byte_level(tmp_path)
    (directory / "tokenizer.json").unlink()
    message = r"tokenizer\.json is missing; .* tokenizer\.model, .* tekken\.json\. Copy the tokenizer files"
    with pytest.raises(CheckpointError, match=message):
        opened(directory)
    (directory / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tekken\.json is read with mistral-common: pip install mistral-common$"):
        opened(directory)


def test_added_tokens_without_a_row_are_ordinary_text(tmp_path: Path) -> None:
    directory = byte_level(tmp_path, pad_token="[PAD]", eos_token="<|end|>")
    assert opened(directory).token_ids(["a [PAD]"])[0][-1] == 512
    tokenizer = opened(directory, vocab_size=512)
    plain = opened(byte_level(tmp_path / "plain"))
    texts = ["[PAD]", "a [PAD] <|end|>"]
    assert tokenizer.token_ids(texts) == serialized_ids(tokenizer, texts) == plain.token_ids(texts)
    assert "'[PAD]' has no row in the embedding table (512 rows): read as ordinary text" in tokenizer.notes
    assert tokenizer.eos_token == "<|end|>"
    check_serialized(tokenizer)


def test_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has tokens up to id 511; the model's embedding table has 500 rows\."):
        opened(byte_level(tmp_path), vocab_size=500)


def test_pad_token(tmp_path: Path) -> None:
    directory = byte_level(tmp_path)
    config = directory / "config.json"
    assert opened(directory).pad_token_id == 0
    config.write_text('{"model_type": "qwen2", "eos_token_id": [3, 4]}')
    assert opened(directory).pad_token_id == 3
    byte_level(tmp_path, eos_token={"__type": "AddedToken", "content": "<|end|>"})
    config.write_text('{"model_type": "qwen2", "eos_token_id": 3}')
    assert opened(directory).pad_token_id == 0
    byte_level(tmp_path)
    config.write_text('{"model_type": "qwen2", "eos_token_id": 600}')
    with pytest.raises(CheckpointError, match=r"has the eos_token_id 600; the embedding table has 520 rows"):
        opened(directory)
    config.write_text('{"model_type": "qwen2"}')
    message = r"has no eos_token in tokenizer_config\.json and no eos_token_id in config\.json; "
    with pytest.raises(CheckpointError, match=message):
        opened(directory)


def test_the_adapters_own_tokenizer_is_mentioned(tmp_path: Path) -> None:
    model, adapter = byte_level(tmp_path / "model"), tmp_path / "adapter"
    adapter.mkdir()
    assert adapter_note(model, None) is None
    assert adapter_note(model, adapter) is None
    shutil.copyfile(model / "tokenizer.json", adapter / "tokenizer.json")
    assert adapter_note(model, adapter) is None
    (adapter / "tokenizer.json").write_text("{}")
    assert "is not used: the tokenizer is the model's" in (adapter_note(model, adapter) or "")


def test_add_eos_needs_the_token(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--add-eos needs an end-of-sequence token, but that of .* is None\."):
        opened(byte_level(tmp_path)).prompt_tokenizer(max_tokens=8, add_eos=True)


@pytest.mark.parametrize(("side", "kept"), [("right", slice(4)), ("left", slice(-4, None))], ids=["right", "left"])
def test_eos_is_appended_before_truncation(side: str, kept: slice, tmp_path: Path) -> None:
    """As in the official code, a long text loses it where it is cut on the right."""
    tokenizer = opened(byte_level(tmp_path, eos_token="<|end|>", truncation_side=side))
    prompts = tokenizer.prompt_tokenizer(max_tokens=4, add_eos=True)
    assert prompts.truncation_side is TruncationSide(side)
    plain = tokenizer.token_ids(["a rather long text", "Instruct: Find it\nQuery:a"])
    assert prompts(["", "a rather long text"]) == [[0], [*plain[0], 0][kept]]
    assert prompts(["a"], instruction="Find it") == [[*plain[1], 0][kept]]


def test_the_truncation_side_of_tokenizer_json_counts(tmp_path: Path) -> None:
    (case,) = (case for case in RECORDED["cases"] if case["name"] == "truncation and padding in tokenizer.json")
    prompts = opened(write_case(case, tmp_path)).prompt_tokenizer(max_tokens=3)
    assert prompts(["1 2 3 4"]) == [opened(tmp_path).token_ids(["1 2 3 4"])[0][-3:]]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_what_transformers_5_saved_is_read_as_it_is(prefix: bool, legacy: bool, tmp_path: Path) -> None:
    settings = {**LLAMA, "add_prefix_space": prefix, "legacy": legacy}
    directory = sentencepiece(tmp_path / "before", **{"tokenizer_config.json": settings})
    before = AutoTokenizer.from_pretrained(directory)
    before.save_pretrained(tmp_path / "after")
    shutil.copyfile(directory / "config.json", tmp_path / "after" / "config.json")
    texts = list(TEXTS)
    theirs = before(texts, add_special_tokens=False)["input_ids"]
    assert serialized_ids(opened(tmp_path / "after"), texts) == theirs


@pytest.mark.parametrize("name", ["pipeline", "LlamaConfig", "NoSuchTokenizer", 3, ["LlamaTokenizer"]])
def test_a_class_that_is_no_tokenizer_is_not_used(name: object, tmp_path: Path) -> None:
    case = {"tokenizer_config.json": {"tokenizer_class": name}, "vocab.json": "", "tokenizer.json": None}
    directory = write_case({"base": "byte-level", "files": case}, tmp_path)
    try:
        check_serialized(opened(directory))
    except CheckpointError as err:
        assert "cannot be used by transformers" in str(err)  # noqa: PT017


def test_awkward_texts_hold_every_added_token_alone_and_inside() -> None:
    texts = awkward_texts(["<X>", "<X>", "<Y>"], random_texts=50)
    assert {"<X>", "a<X>b", "<Y>", "a<Y>b"} < {*texts}
    assert len(texts) == len(TEXTS) + 6 + 50
    assert texts == awkward_texts(["<X>", "<Y>"], random_texts=50)
    assert texts != awkward_texts(["<X>", "<Y>"], random_texts=50, seed=1)


@pytest.fixture(scope="session")
def suffixed_bundle(small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose tokenizer_config.json adds a token, an end of sequence and left truncation."""
    root = tmp_path_factory.mktemp("suffixed")
    checkpoint = shutil.copytree(small_models.checkpoint("qwen2"), root / "checkpoint")
    config = {**PLAIN, "eos_token": "<|end|>", "pad_token": "[PAD]", "truncation_side": "left"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    options = ExportOptions(output=root / "bundle", steps=2, model=str(checkpoint), max_tokens=20, add_eos=True)
    return export_bundle(options)


def test_vectors_with_eos_left_truncation_and_a_folded_token(suffixed_bundle: Path, small_models: SmallModels) -> None:
    tokenizer = Tokenizer.from_file(str(DATA / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    texts = ["a short text", "with [PAD] inside", "", "a text that is a good deal longer than the twenty tokens " * 3]
    model = small_models.load("qwen2")
    ids = [tokenizer.encode(f"{text}<|end|>", add_special_tokens=False).ids[-20:] for text in texts]
    assert 512 in ids[1]
    assert (ids[2], len(ids[3]), ids[3][-1]) == ([0], 20, 0)
    wanted = torch.stack([plain_embeddings(plain_states(model, row, 2), "mean") for row in ids]).numpy()
    found = Embedder(suffixed_bundle).encode(texts, all_steps=True)
    assert np.abs(found - wanted).max() < SMALL_MODEL_MAX_DIFFERENCE
    assert Embedder(suffixed_bundle).self_test().passed


@pytest.mark.parametrize(
    "name",
    [
        "llama, legacy null, add_prefix_space absent",
        "llama, legacy false, add_prefix_space false, tokenizer.model alone",
        "llama with a pad token, tokenizer.model alone",
    ],
)
def test_vectors_of_the_ids_that_transformers_4_recorded(
    name: str, small_models: SmallModels, small_checkpoint: Path, tmp_path: Path
) -> None:
    (case,) = (case for case in RECORDED["cases"] if case["name"] == name)
    config = json.loads((small_checkpoint / "config.json").read_text())
    (small_checkpoint / "tokenizer.json").unlink()
    write_case({**case, "files": {**case["files"], "config.json": config}}, small_checkpoint)
    options = ExportOptions(output=tmp_path / "bundle", steps=1, layout="stepwise", model=str(small_checkpoint))  # type: ignore[arg-type]
    embedder = Embedder(export_bundle(dataclasses.replace(options, max_tokens=48)))
    texts, ids = RECORDED["texts"][1:], case["ids"][1:]
    model = small_models.load("qwen2")
    wanted = torch.cat([plain_embeddings(plain_states(model, row, 1), "mean") for row in ids]).numpy()
    assert np.abs(embedder.encode(texts) - wanted).max() < SMALL_MODEL_MAX_DIFFERENCE


def test_the_manifest_records_what_makes_the_ids(suffixed_bundle: Path) -> None:
    manifest = Bundle.open(suffixed_bundle).manifest
    assert (manifest.tokenizer, manifest.prompt_suffix) == (JSON, "<|end|>")
    assert manifest.truncation_side is TruncationSide.LEFT
    assert set(manifest.files) >= {"tokenizer.json"}


def test_a_bundle_of_schema_2_is_read(suffixed_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(suffixed_bundle, tmp_path / "bundle")

    def downgrade(manifest: dict[str, Any]) -> None:
        manifest["schema_version"] = 2
        for name in ("tokenizer", "prompt_suffix", "truncation_side"):
            del manifest[name]

    edit_manifest(bundle, downgrade)
    prompts = open_tokenizer(Bundle.open(bundle))
    assert (prompts.prompt_suffix, prompts.truncation_side) == ("", TruncationSide.RIGHT)


def test_the_gate_judges_by_the_kind_of_the_bundle(suffixed_bundle: Path) -> None:
    bundle = Bundle.open(suffixed_bundle)
    checkpoint = resolve_checkpoint(str(suffixed_bundle.parent / bundle.manifest.model.name))
    prompts = [Prompt(text, instruction) for text in TEXTS for instruction in ("", "Find it")]
    theirs = checkpoint_token_ids(checkpoint, bundle, prompts)
    ours = [open_tokenizer(bundle)([prompt.text], instruction=prompt.instruction)[0] for prompt in prompts]
    assert theirs == ours
    auto = dataclasses.replace(bundle, manifest=_with_kind(bundle, AUTO))
    assert checkpoint_token_ids(checkpoint, auto, prompts) != ours  # AutoTokenizer rebuilds a Qwen2Tokenizer


def _with_kind(bundle: Bundle, kind: TokenizerKind) -> Any:
    import msgspec

    return msgspec.structs.replace(bundle.manifest, tokenizer=kind)


def test_the_command_says_what_it_reads(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**PLAIN, "eos_token": "<|end|>", "additional_special_tokens": ["<X>"]}
    (small_checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    shared = ["--model", str(small_checkpoint), "--steps", "1", "--max-tokens", "16"]
    assert main([*shared, "--tokenizer", "auto", "--output", str(tmp_path / "auto")]) == 0
    said = capsys.readouterr().err
    assert "the token ids are those of --tokenizer auto; --tokenizer json gives others" in said
    manifest = Bundle.open(tmp_path / "auto").manifest
    assert manifest.tokenizer is AUTO
    theirs = AutoTokenizer.from_pretrained(small_checkpoint)
    texts = ["a <X> b", "leading", " spaces", "12345"]
    ours = parse_tokenizer((tmp_path / "auto" / "tokenizer.json").read_text())
    assert [ours.encode(text, add_special_tokens=False).ids for text in texts] == theirs(texts)["input_ids"]
    assert main([*shared, "--output", str(tmp_path / "json")]) == 0
    assert "the files beside tokenizer.json add '<X>' (id 512)" in capsys.readouterr().err
