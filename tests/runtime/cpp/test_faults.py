"""Wrong arguments, small buffers, foreign structs and closed embedders: one error each, and nothing is printed."""

import ctypes
import threading
from collections.abc import Iterator
from ctypes import byref, c_float, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cpp_library import (
    Code,
    CppEmbedder,
    CppError,
    CppLibrary,
    Description,
    EncodeOptions,
    OpenOptions,
    SelfTestReport,
    Text,
    text_array,
)
from support.small_models import SmallModels

from gircse.runtime import Embedder, OptionError

TEXTS = ["how do I reset the card", "", "the small bird sings"]


@pytest.fixture(autouse=True)
def _nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def library(cpp_library: Path, onnxruntime_library: Path) -> CppLibrary:
    return CppLibrary(cpp_library, onnxruntime_library)


@pytest.fixture(scope="module")
def bundle(small_models: SmallModels) -> Path:
    return small_models.bundle("qwen2", layout="stepwise")


@pytest.fixture
def subject(library: CppLibrary, bundle: Path) -> Iterator[CppEmbedder]:
    with library.open(bundle, threads=1) as embedder:
        yield embedder


def fault(code: Code, match: str) -> Any:
    return pytest.raises(CppError, match=f"^{code.name}: {match}")


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        ({"threads": -1}, Code.OPTION, r"threads is -1; it has to be at least 1\. Leave it at 0 "),
        ({"provider": "gpu"}, Code.OPTION, r"provider is 'gpu'; it has to be one of auto, cpu, cuda, onnxruntime-tens"),
        ({"provider": ""}, Code.OPTION, r"provider is ''; it has to be one of "),
        (
            {"provider": "tensorrt"},
            Code.PROVIDER,
            r"provider tensorrt is not in libgircse; .* Python runtime for engin",
        ),
        ({"provider": "tensorrt-rtx"}, Code.PROVIDER, r"provider tensorrt-rtx is not in libgircse; "),
        ({"provider": "cuda"}, Code.PROVIDER, r"provider cuda needs CUDAExecutionProvider; .*CPUExecutionProvider"),
        ({"provider": "onnxruntime-tensorrt"}, Code.PROVIDER, r"provider onnxruntime-tensorrt needs TensorrtExecution"),
        ({"layout": "rolled"}, Code.OPTION, r"layout is 'rolled'; it has to be one of unrolled, stepwise\.$"),
        ({"layout": "unrolled"}, Code.BUNDLE, r".* has no unrolled graph; it has stepwise\. "),
        ({"precision": "fp8"}, Code.BUNDLE, r".* has no precision 'fp8'; it has fp32\. Choose one of these\.$"),
    ],
)
def test_options_of_open(library: CppLibrary, bundle: Path, options: dict[str, Any], code: Code, match: str) -> None:
    with fault(code, match):
        library.open(bundle, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 6}, r"steps is 6; this bundle has 0 to 5\. Choose one of these, or export with --steps 6$"),
        ({"steps": 65}, r"steps is 65; this bundle has 0 to 5\. Choose one of these\.$"),
        ({"steps": -2}, r"steps is -2; this bundle has 0 to 5\. "),
        ({"batch_size": 0}, r"batch_size is 0; it has to be at least 1\.$"),
        ({"batch_tokens": 0}, r"batch_tokens is 0; it has to be at least 1\.$"),
        (
            {"instruction": "a", "prompt": "b"},
            r"instruction is 'a' and prompt is 'b'; only one of them can be given\. ",
        ),
        ({"instruction": "a", "prompt": ""}, r"instruction is 'a' and prompt is ''; only one of them can be given\. "),
        ({"instruction": b"a\xff"}, r"instruction is not UTF-8: [a-z ]+ at byte 1\. "),
        ({"prompt": b"\xed\xa0\x80"}, r"prompt is not UTF-8: [a-z ]+ at byte 0\. "),
        ({"instruction": Text(None, 3)}, r"instruction has no data, and 3 bytes\.$"),
        ({"prompt": Text(None, 3)}, r"prompt has no data, and 3 bytes\.$"),
    ],
)
def test_options_of_encode(subject: CppEmbedder, options: dict[str, Any], match: str) -> None:
    with fault(Code.OPTION, match):
        encode_raw(subject, subject.library.encode_options(**options))


def encode_raw(subject: CppEmbedder, options: Any, *, floats: int = 10_000) -> None:
    vectors = (c_float * floats)()
    pointer = byref(options) if options is not None else None
    subject.library.call("encode", subject.handle, text_array(TEXTS), len(TEXTS), pointer, vectors, floats, None)


def test_no_options_are_the_defaults(subject: CppEmbedder) -> None:
    vectors = np.empty((3, 48), np.float32)
    out = vectors.ctypes.data_as(ctypes.POINTER(c_float))
    subject.library.call("encode", subject.handle, text_array(TEXTS), 3, None, out, vectors.size, None)
    np.testing.assert_array_equal(vectors, subject.encode(TEXTS))


@pytest.mark.parametrize(
    ("text", "byte"),
    [
        (b"\xff", 0),
        (b"ab\x80", 2),
        ("ä".encode()[:1], 0),
        ("the 😀".encode()[:-1], 4),
        (b"\xc0\x80", 0),  # an overlong NUL
        (b"a\xe0\x80\x80", 1),
        (b"\xed\xa0\x80", 0),  # a surrogate
        (b"\xf4\x90\x80\x80", 0),  # above U+10FFFF
        (b"a" * 100_000 + b"\xc3(", 100_000),
    ],
)
def test_texts_that_are_not_utf8(subject: CppEmbedder, text: bytes, byte: int) -> None:
    with pytest.raises(UnicodeDecodeError) as expected:
        text.decode()
    assert expected.value.start == byte
    for call in (subject.encode, subject.tokenize):
        with fault(Code.OPTION, rf"texts\[1\] is not UTF-8: [a-z ]+ at byte {byte}\. Repair the text\.$"):
            call(["fine", text])


def test_a_nul_is_text(subject: CppEmbedder) -> None:
    vectors = subject.encode(["a\0b", "a", "\0", ""])
    assert len(np.unique(vectors, axis=0)) == 4
    assert subject.tokenize(["a\0b"]) != subject.tokenize(["a"])


def test_texts_that_are_too_long_are_refused_where_wanted(subject: CppEmbedder) -> None:
    long = "ships " * 100
    with fault(
        Code.OPTION, r"texts\[1\] has \d+ tokens; the bundle takes at most 48, the instruction included\. Short"
    ):
        subject.encode(["short", long], refuse_overflow=1)
    assert subject.encode(["short", long]).shape == (2, 48)
    assert subject.truncated == 1


@pytest.mark.parametrize("first", [0, 7])
def test_texts_that_are_too_long_are_counted_as_in_python(subject: CppEmbedder, bundle: Path, first: int) -> None:
    texts = ["short", "ships " * 100, "", "ships " * 90]
    with Embedder(bundle, provider="cpu") as python, pytest.raises(OptionError) as expected:
        python.tokenizer.tokenize(texts, on_overflow="error", first_row=first)
    with pytest.raises(CppError) as found:
        subject.encode(texts, refuse_overflow=1, first_text=first)
    python_hint = "allow truncation with on_overflow='truncate'."
    assert found.value.message == str(expected.value).replace(python_hint, "allow truncation.")
    with fault(Code.OPTION, rf"texts\[{first + 1}\] is not UTF-8: invalid start byte at byte 0\."):
        subject.encode(["a", b"\xff"], first_text=first)


@pytest.mark.parametrize("options", [{}, {"all_steps": 1}, {"all_steps": 1, "steps": 2}])
def test_buffers_that_are_too_small(subject: CppEmbedder, options: dict[str, Any]) -> None:
    chosen = subject.library.encode_options(**options)
    row = 48 * (chosen.steps if chosen.steps > 0 else 5) if chosen.all_steps else 48
    for floats in (0, 1, 3 * row - 1):
        match = rf"vectors has room for {floats} elements; 3 texts of {row} elements are to be written\.$"
        with fault(Code.CAPACITY, match):
            encode_raw(subject, chosen, floats=floats)
    encode_raw(subject, chosen, floats=3 * row)


def test_a_count_beyond_all_memory(subject: CppEmbedder) -> None:
    """The size of the output would overflow; no text is read before that is found."""
    call, options = subject.library.call, subject.library.encode_options()
    lengths, ids, vectors = (c_size_t * 1)(1), (c_int64 * 1)(1), (c_float * 48)()
    with fault(Code.CAPACITY, r"vectors has room for 48 elements; 18446744073709551615 texts of 48 elements"):
        call("encode", subject.handle, text_array(["a"]), 2**64 - 1, byref(options), vectors, 48, None)
    with fault(Code.CAPACITY, r"vectors has room for 48 elements; 18446744073709551615 texts of 48 elements"):
        call("encode_tokens", subject.handle, ids, lengths, 2**64 - 1, byref(options), vectors, 48)


def test_a_buffer_of_ids_that_is_too_small(subject: CppEmbedder) -> None:
    ids, lengths = (c_int64 * 3)(), (c_size_t * 3)()
    with fault(Code.CAPACITY, r"ids has room for 3 elements; "):
        subject.library.call("tokenize", subject.handle, text_array(TEXTS), 3, None, ids, 3, lengths, None)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([[1], []], r"prompt 1 has 0 tokens; the bundle takes 1 to 48\.$"),
        ([[1] * 49], r"prompt 0 has 49 tokens; the bundle takes 1 to 48\.$"),
        ([[1], [2, 520]], r"prompt 1 has the token 520; the tokens of the model are 0 to 519\.$"),
        ([[-1]], r"prompt 0 has the token -1; the tokens of the model are 0 to 519\.$"),
    ],
)
def test_tokens_that_the_bundle_does_not_take(subject: CppEmbedder, rows: list[list[int]], match: str) -> None:
    with fault(Code.OPTION, match):
        subject.encode_tokens(rows)


@pytest.mark.parametrize("options", [{"instruction": "a"}, {"prompt": ""}, {"refuse_overflow": 1}])
def test_options_that_tokens_do_not_have(subject: CppEmbedder, options: dict[str, Any]) -> None:
    with fault(Code.OPTION, r"instruction, prompt or refuse_overflow is set; token ids are the whole prompt\. "):
        subject.encode_tokens([[1]], **options)


def test_pointers_that_are_null(library: CppLibrary, subject: CppEmbedder, bundle: Path) -> None:
    texts, lengths, ids, vectors = text_array(["a"]), (c_size_t * 1)(1), (c_int64 * 48)(1), (c_float * 48)()
    handle, path, options = subject.handle, str(bundle).encode(), byref(library.open_options())
    opened = c_void_p()
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("bundle is NULL", ("open", None, options, byref(opened))),
        ("embedder is NULL", ("open", path, options, None)),
        ("texts is NULL", ("encode", handle, None, 1, None, vectors, 48, None)),
        ("vectors is NULL", ("encode", handle, texts, 1, None, None, 48, None)),
        (
            r"texts\[0\] has no data, and 2 bytes",
            ("encode", handle, (Text * 1)(Text(None, 2)), 1, None, vectors, 48, None),
        ),
        ("ids or lengths is NULL", ("encode_tokens", handle, None, lengths, 1, None, vectors, 48)),
        ("ids or lengths is NULL", ("encode_tokens", handle, ids, None, 1, None, vectors, 48)),
        ("vectors is NULL", ("encode_tokens", handle, ids, lengths, 1, None, None, 48)),
        ("texts is NULL", ("tokenize", handle, None, 1, None, ids, 48, lengths, None)),
        ("ids is NULL", ("tokenize", handle, texts, 1, None, None, 48, lengths, None)),
        ("lengths is NULL", ("tokenize", handle, texts, 1, None, ids, 48, None, None)),
        ("description is NULL", ("describe", handle, None)),
        ("report is NULL", ("self_test", handle, None)),
    ]
    for match, (name, *arguments) in calls:
        with fault(Code.OPTION, rf"{match}\.$"):
            library.call(name, *arguments)
    assert opened.value is None
    for name, *arguments in (
        ("encode", None, texts, 1, None, vectors, 48, None),
        ("encode_tokens", None, ids, lengths, 1, None, vectors, 48),
        ("tokenize", None, texts, 1, None, ids, 48, lengths, None),
        ("describe", None, byref(Description(size=ctypes.sizeof(Description)))),
        ("self_test", None, byref(SelfTestReport(size=ctypes.sizeof(SelfTestReport)))),
    ):
        with fault(Code.CLOSED, r"embedder is closed\. Open the bundle again\.$"):
            library.call(name, *arguments)
    assert library.functions["error_code"](None) == Code.OK
    assert library.functions["error_message"](None) == b""
    library.functions["error_free"](None)
    library.functions["close"](None)
    library.functions["open_options_init"](None, 100)
    library.functions["encode_options_init"](None, 100)


def test_no_texts_need_no_pointers(library: CppLibrary, subject: CppEmbedder) -> None:
    library.call("encode", subject.handle, None, 0, None, None, 0, None)
    library.call("encode_tokens", subject.handle, None, None, 0, None, None, 0)
    library.call("tokenize", subject.handle, None, 0, None, None, 0, None, None)
    library.call("encode", subject.handle, (Text * 1)(Text(None, 0)), 1, None, (c_float * 48)(), 48, None)


def test_the_embedder_is_null_after_a_failed_open(library: CppLibrary, tmp_path: Path) -> None:
    handle = c_void_p(1)
    with fault(Code.BUNDLE, ".* is not a bundle"):
        library.call("open", str(tmp_path).encode(), byref(library.open_options()), byref(handle))
    assert handle.value is None


class NewerOpenOptions(ctypes.Structure):
    _fields_ = [*OpenOptions._fields_, ("later", ctypes.c_char_p)]


class NewerEncodeOptions(ctypes.Structure):
    _fields_ = [*EncodeOptions._fields_, ("later", c_size_t)]


class NewerDescription(ctypes.Structure):
    _fields_ = [*Description._fields_, ("later", c_size_t)]


class NewerReport(ctypes.Structure):
    _fields_ = [*SelfTestReport._fields_, ("later", c_size_t)]


def test_a_newer_struct_may_leave_its_new_fields_alone(library: CppLibrary, bundle: Path) -> None:
    options, handle = NewerOpenOptions(later=b"x"), c_void_p()
    library.functions["open_options_init"](byref(options), ctypes.sizeof(options))
    assert (options.size, options.verify, options.later) == (ctypes.sizeof(options), 1, None)
    options.onnxruntime = str(library.onnxruntime).encode()
    library.call("open", str(bundle).encode(), byref(options), byref(handle))
    with CppEmbedder(library, handle) as subject:
        chosen = NewerEncodeOptions(later=7)
        library.functions["encode_options_init"](byref(chosen), ctypes.sizeof(chosen))
        assert (chosen.size, chosen.steps, chosen.later) == (ctypes.sizeof(chosen), -1, 0)
        encode_raw(subject, chosen)
        chosen.later = 1
        with fault(Code.OPTION, r"encode_options set a field that this libgircse does not know\. Upgrade libgircse\.$"):
            encode_raw(subject, chosen)
        found, report = NewerDescription(later=7), NewerReport(later=7)
        found.size, report.size = ctypes.sizeof(found), ctypes.sizeof(report)
        library.call("describe", handle, byref(found))
        library.call("self_test", handle, byref(report))
        assert (found.size, found.dimension, found.later) == (ctypes.sizeof(found), 48, 0)
        assert (report.size, report.passed, report.later) == (ctypes.sizeof(report), 1, 0)
    options.later = b"x"
    with fault(Code.OPTION, r"open_options set a field that this libgircse does not know\. Upgrade libgircse\.$"):
        library.call("open", str(bundle).encode(), byref(options), byref(handle))


class OlderOpenOptions(ctypes.Structure):
    _fields_ = OpenOptions._fields_[:5]


class OlderEncodeOptions(ctypes.Structure):
    _fields_ = EncodeOptions._fields_[:5]


class OlderDescription(ctypes.Structure):
    _fields_ = [*Description._fields_[:2], ("guard", c_size_t)]


class OlderReport(ctypes.Structure):
    _fields_ = [*SelfTestReport._fields_[:4], ("guard", c_size_t)]


def test_an_older_struct_keeps_the_defaults_of_later_fields(library: CppLibrary, bundle: Path) -> None:
    options, handle = OlderOpenOptions(), c_void_p()
    library.functions["open_options_init"](byref(options), ctypes.sizeof(options))
    options.onnxruntime = str(library.onnxruntime).encode()
    library.call("open", str(bundle).encode(), byref(options), byref(handle))
    with CppEmbedder(library, handle) as subject:
        chosen = OlderEncodeOptions()
        library.functions["encode_options_init"](byref(chosen), ctypes.sizeof(chosen))
        assert (chosen.size, chosen.steps) == (ctypes.sizeof(chosen), -1)
        encode_raw(subject, chosen)
        found, report = OlderDescription(guard=7), OlderReport(guard=7)
        found.size, report.size = OlderDescription.guard.offset, OlderReport.guard.offset
        library.call("describe", handle, byref(found))
        library.call("self_test", handle, byref(report))
        assert (found.size, found.dimension, found.guard) == (OlderDescription.guard.offset, 48, 7)
        assert (report.size, report.passed, report.guard) == (OlderReport.guard.offset, 1, 7)


@pytest.mark.parametrize("size", [0, 1, 7, 9, 63])
def test_a_size_that_no_struct_has(library: CppLibrary, subject: CppEmbedder, bundle: Path, size: int) -> None:
    options, handle, chosen = library.open_options(), c_void_p(), library.encode_options()
    options.size = chosen.size = size
    with fault(Code.OPTION, rf"open_options have the size {size}; .* Call gircse_open_options_init first\.$"):
        library.call("open", str(bundle).encode(), byref(options), byref(handle))
    with fault(Code.OPTION, rf"encode_options have the size {size}; .* Call gircse_encode_options_init first\.$"):
        encode_raw(subject, chosen)
    if size < 8:
        with fault(Code.OPTION, rf"description has the size {size}; "):
            library.call("describe", subject.handle, byref(Description(size=size)))
        with fault(Code.OPTION, rf"report has the size {size}; "):
            library.call("self_test", subject.handle, byref(SelfTestReport(size=size)))


def test_a_closed_embedder_stays_closed(library: CppLibrary, bundle: Path) -> None:
    subject = library.open(bundle, threads=1)
    for _ in range(2):
        subject.close()
        for call in (lambda: subject.encode(TEXTS), lambda: subject.tokenize(TEXTS), subject.self_test):
            with fault(Code.CLOSED, r"embedder is closed\. Open the bundle again\.$"):
                call()
    with library.open(bundle, threads=1) as other:  # even where the memory is used again
        with fault(Code.CLOSED, "embedder is closed"):
            subject.encode(TEXTS)
        assert other.encode(TEXTS).shape == (3, 48)


def test_closing_while_other_threads_encode_lets_them_finish(library: CppLibrary, bundle: Path) -> None:
    subject = library.open(bundle, threads=1)
    expected = subject.encode(TEXTS * 4)
    outcomes: list[Any] = []
    running = threading.Barrier(5)

    def encode_until_closed() -> None:
        running.wait()
        try:
            while True:
                np.testing.assert_array_equal(subject.encode(TEXTS * 4), expected)
        except BaseException as err:
            outcomes.append(err)

    threads = [threading.Thread(target=encode_until_closed) for _ in range(4)]
    for thread in threads:
        thread.start()
    running.wait()
    subject.close()
    for thread in threads:
        thread.join(timeout=60)
    assert [getattr(err, "code", err) for err in outcomes] == [Code.CLOSED] * 4
