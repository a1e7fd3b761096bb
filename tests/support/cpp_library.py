"""The C interface of libgircse in ctypes: the structs and functions of gircse.h."""

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from gircse.runtime.errors import BundleError, GircseError, OptionError, ProviderError
from gircse.runtime.numerics import Float32, Int64


class Code(IntEnum):
    """The enumerators of gircse_code, without their prefix."""

    OK = 0
    OPTION = 1
    BUNDLE = 2
    PROVIDER = 3
    CLOSED = 4
    CAPACITY = 5
    MEMORY = 6
    INTERNAL = 7


PYTHON_ERRORS: dict[Code, type[GircseError]] = {
    Code.OPTION: OptionError,
    Code.BUNDLE: BundleError,
    Code.PROVIDER: ProviderError,
    Code.CLOSED: OptionError,
    Code.MEMORY: ProviderError,
}
"""What the Python runtime raises for the same fault."""


class CppError(Exception):
    """An error of the library: its code and its message."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class Text(ctypes.Structure):
    _fields_ = [("data", c_char_p), ("size", c_size_t)]

    @classmethod
    def of(cls, text: str | bytes) -> Self:
        data = text.encode() if isinstance(text, str) else text
        return cls(data, len(data))


class OpenOptions(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("precision", c_char_p),
        ("provider", c_char_p),
        ("layout", c_char_p),
        ("onnxruntime", c_char_p),
        ("threads", c_int32),
        ("verify", c_int32),
        ("prefix_cache", c_int32),
        ("streams", c_size_t),
    ]


class EncodeOptions(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("instruction", Text),
        ("prompt", Text),
        ("steps", c_int32),
        ("all_steps", c_int32),
        ("batch_size", c_size_t),
        ("batch_tokens", c_size_t),
        ("refuse_overflow", c_int32),
        ("first_text", c_size_t),
    ]


class Description(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("dimension", c_size_t),
        ("steps", c_size_t),
        ("max_tokens", c_size_t),
        ("precision", c_char_p),
        ("provider", c_char_p),
        ("layout", c_char_p),
        ("query_instruction", c_char_p),
        ("onnxruntime", c_char_p),
        ("skipped", c_char_p),
        ("warning", c_char_p),
    ]


class SelfTestReport(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("texts", c_size_t),
        ("passed", c_int32),
        ("min_cosine", c_double),
        ("limit", c_double),
        ("max_difference", c_double),
        ("worst_step", c_size_t),
        ("worst_text", c_size_t),
    ]


_SIZES, _FLOATS, _IDS = POINTER(c_size_t), POINTER(c_float), POINTER(c_int64)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "abi_version": (c_uint32, []),
    "version": (c_char_p, []),
    "open_options_init": (None, [c_void_p, c_size_t]),
    "encode_options_init": (None, [c_void_p, c_size_t]),
    "open": (c_void_p, [c_char_p, c_void_p, POINTER(c_void_p)]),
    "close": (None, [c_void_p]),
    "describe": (c_void_p, [c_void_p, c_void_p]),
    "encode": (c_void_p, [c_void_p, POINTER(Text), c_size_t, c_void_p, _FLOATS, c_size_t, _SIZES]),
    "encode_tokens": (c_void_p, [c_void_p, _IDS, _SIZES, c_size_t, c_void_p, _FLOATS, c_size_t]),
    "tokenize": (c_void_p, [c_void_p, POINTER(Text), c_size_t, c_void_p, _IDS, c_size_t, _SIZES, _SIZES]),
    "self_test": (c_void_p, [c_void_p, c_void_p]),
    "error_code": (c_int32, [c_void_p]),
    "error_message": (c_char_p, [c_void_p]),
    "error_free": (None, [c_void_p]),
}


class CppLibrary:
    """libgircse, loaded into this process.

    Attributes:
        functions: the functions of gircse.h by name, without their prefix.
        onnxruntime: the library that ``open`` names, or None.
    """

    def __init__(self, path: Path, onnxruntime: Path | None = None) -> None:
        library = ctypes.CDLL(str(path))
        self.functions: dict[str, Any] = {}
        self.onnxruntime = onnxruntime
        for name, (result, arguments) in _FUNCTIONS.items():
            function = library[f"gircse_{name}"]
            function.restype, function.argtypes = result, arguments
            self.functions[name] = function

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function that returns an error.

        Raises:
            CppError: it did.
        """
        error = self.functions[function](*arguments)
        if error:
            code = Code(self.functions["error_code"](error))
            message = self.functions["error_message"](error).decode()  # strict: a message is UTF-8
            self.functions["error_free"](error)
            raise CppError(code, message)

    def open_options(self, **options: Any) -> OpenOptions:
        """Return the defaults, but for some fields; strings and paths are encoded."""
        struct = OpenOptions()
        self.functions["open_options_init"](byref(struct), ctypes.sizeof(struct))
        for name, value in ({"onnxruntime": self.onnxruntime} | options).items():
            setattr(struct, name, str(value).encode() if isinstance(value, (str, Path)) else value)
        return struct

    def encode_options(self, **options: Any) -> EncodeOptions:
        """Return the defaults, but for some fields; strings become texts."""
        struct = EncodeOptions()
        self.functions["encode_options_init"](byref(struct), ctypes.sizeof(struct))
        for name, value in options.items():
            setattr(struct, name, Text.of(value) if isinstance(value, (str, bytes)) else value)
        return struct

    def open(self, bundle: str | Path, **options: Any) -> "CppEmbedder":
        """Open a bundle; the options are the fields of gircse_open_options."""
        handle = c_void_p()
        self.call("open", str(bundle).encode(), byref(self.open_options(**options)), byref(handle))
        return CppEmbedder(self, handle)


class CppEmbedder:
    """A bundle that is open in the library; the options of its methods are the fields of gircse_encode_options.

    Attributes:
        truncated: how many texts the last call cut.
    """

    def __init__(self, library: CppLibrary, handle: c_void_p) -> None:
        self.library, self.handle, self.truncated = library, handle, 0
        self.description = Description(size=ctypes.sizeof(Description))
        library.call("describe", handle, byref(self.description))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.library.functions["close"](self.handle)

    def encode(self, texts: Sequence[str | bytes], **options: Any) -> Float32:
        """Return (n, dimension) vectors, or (n, steps, dimension) with ``all_steps``."""
        chosen = self.library.encode_options(**options)
        vectors, cut = self._vectors(len(texts), chosen), c_size_t()
        out = vectors.ctypes.data_as(_FLOATS)
        self.library.call(
            "encode", self.handle, text_array(texts), len(texts), byref(chosen), out, vectors.size, byref(cut)
        )
        self.truncated = cut.value
        return vectors

    def encode_tokens(self, token_ids: Sequence[Sequence[int]], **options: Any) -> Float32:
        """Return the vectors of token ids, as ``encode`` does of texts."""
        chosen = self.library.encode_options(**options)
        vectors = self._vectors(len(token_ids), chosen)
        ids: Int64 = np.array([token for row in token_ids for token in row], np.int64)
        lengths = (c_size_t * len(token_ids))(*map(len, token_ids))
        self.library.call(
            "encode_tokens",
            self.handle,
            ids.ctypes.data_as(_IDS),
            lengths,
            len(token_ids),
            byref(chosen),
            vectors.ctypes.data_as(_FLOATS),
            vectors.size,
        )
        return vectors

    def tokenize(self, texts: Sequence[str | bytes], **options: Any) -> list[list[int]]:
        """Return the token ids of each text."""
        ids: Int64 = np.empty(len(texts) * self.description.max_tokens, np.int64)
        lengths, cut = (c_size_t * len(texts))(), c_size_t()
        chosen = self.library.encode_options(**options)
        out = ids.ctypes.data_as(_IDS)
        self.library.call(
            "tokenize", self.handle, text_array(texts), len(texts), byref(chosen), out, ids.size, lengths, byref(cut)
        )
        self.truncated = cut.value
        ends = np.cumsum([0, *lengths])
        return [ids[start:end].tolist() for start, end in itertools.pairwise(ends)]

    def self_test(self) -> SelfTestReport:
        report = SelfTestReport(size=ctypes.sizeof(SelfTestReport))
        self.library.call("self_test", self.handle, byref(report))
        return report

    def _vectors(self, texts: int, options: EncodeOptions) -> Float32:
        """Return NaN in place of vectors: what is not written shows."""
        steps = self.description.steps if options.steps < 0 else options.steps
        shape = (texts, steps) if options.all_steps else (texts,)
        return np.full((*shape, self.description.dimension), np.nan, np.float32)


def text_array(texts: Sequence[str | bytes]) -> Any:
    """Return texts as an array of gircse_text."""
    return (Text * len(texts))(*map(Text.of, texts))
