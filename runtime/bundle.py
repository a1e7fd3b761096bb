"""A bundle on disk, and the checks that run before anything in it is trusted.

Its manifest lists every other file with size and SHA-256, so a bundle is complete exactly when every listed file is
there with that hash.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gircse.runtime.errors import BundleError
from gircse.runtime.manifest import MANIFEST_NAME, FileEntry, Layout, Manifest, Variant, listed
from gircse.runtime.precision import precision_spec
from gircse.runtime.provider import Provider

HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle directory whose manifest has been read and whose files are all there with the right size.

    Attributes:
        directory: the bundle's folder, resolved.
        manifest: its manifest.
    """

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a bundle without reading the big files.

        Raises:
            BundleError: there is no bundle, its manifest cannot be used, a path leaves it, or a file is missing or has
                another size.
        """
        directory = Path(path)
        manifest_path = directory / MANIFEST_NAME
        if not manifest_path.is_file():
            raise BundleError(
                str(directory),
                "is not a bundle",
                f"it has no {MANIFEST_NAME}",
                f"Make one: gircse-export --steps 8 --output {directory}",
            )
        with _readable_file(manifest_path):
            content = manifest_path.read_bytes()
        bundle = cls(directory.resolve(), Manifest.from_json(content))
        for relative, entry in bundle.manifest.files.items():
            bundle._check_size(relative, entry)
        return bundle

    def manifest_sha256(self) -> str:
        """Return the SHA-256 of the manifest, which holds that of every file: what tells one bundle from another."""
        return file_sha256(self.directory / MANIFEST_NAME)

    def file(self, relative: str) -> Path:
        """Return the path of a file of the bundle.

        Raises:
            BundleError: the path is absolute, leads out of the bundle, by ``..`` or by a link, or cannot be a path.
        """
        try:
            path = (self.directory / relative).resolve()
        except (ValueError, OSError, RuntimeError) as err:  # a NUL, a name that is too long, a link to itself
            raise BundleError(
                MANIFEST_NAME,
                f"has the path {relative!r}, which cannot be one: {err}",
                None,
                "Export the bundle again.",
            ) from err
        if Path(relative).is_absolute() or not path.is_relative_to(self.directory):
            raise BundleError(
                MANIFEST_NAME,
                f"has the path {relative!r}, which leaves the bundle",
                f"every path has to stay inside {self.directory}",
                "Do not use this bundle; export it again.",
            )
        return path

    def variant(self, precision: str) -> Variant:
        """Return the files of a precision.

        Raises:
            BundleError: the bundle does not have it.
        """
        variants = self.manifest.variants
        if precision not in variants:
            raise BundleError(
                str(self.directory),
                f"has no precision {precision!r}",
                f"it has {listed(variants)}",
                "Choose one of these.",
            )
        return variants[precision]

    def default_precision(self, preferred: Sequence[str]) -> str:
        """Return the precision to take when none is named: the first preferred one, or the only one there is.

        Raises:
            BundleError: the bundle has several, and none of those preferred.
        """
        variants = self.manifest.variants
        found = next((precision for precision in preferred if precision in variants), None)
        if found is None and len(variants) > 1:
            raise BundleError(
                str(self.directory), "has several precisions and no default", f"it has {listed(variants)}", "Name one."
            )
        return found or next(iter(variants))

    def layout(self, precision: str, provider: Provider, wanted: Layout | None = None) -> Layout:
        """Return the layout to run: the one that is wanted, else the one that suits the provider if there is a choice.

        The CPU takes stepwise, which is as fast, loads in a fifth of the time and keeps the prefixes of prompts, and so
        do engines, which build faster. ONNX Runtime on a GPU takes unrolled: one run in place of K + 1.

        Raises:
            BundleError: the bundle does not have the precision.
        """
        if wanted is not None:
            return wanted
        usual = Layout.UNROLLED if provider in (Provider.CUDA, Provider.ORT_TENSORRT) else Layout.STEPWISE
        graphs = self.variant(precision).graphs
        return usual if usual in graphs else next(iter(graphs))

    def graph(self, precision: str, layout: Layout) -> Path:
        """Return the path of a variant's graph.

        Raises:
            BundleError: the bundle does not have the precision, or not in that layout.
        """
        graphs = self.variant(precision).graphs
        if layout not in graphs:
            other = "take another precision"
            if not precision_spec(precision).calibrated:
                other = f"export again with --layout {layout}"
            raise BundleError(
                f"{self.directory}, {precision},",
                f"has no {layout} graph",
                f"it has {listed(graphs)}",
                f"Choose one of these, or {other}.",
            )
        return self.file(graphs[layout].path)

    def engine_graph(self, precision: str, layout: Layout) -> Path:
        """Return the path of the graph that a TensorRT engine of a variant is built from.

        Raises:
            BundleError: the bundle does not have the precision in that layout, or its INT8 variant has no graph for
                TensorRT: FP16 cannot hold its scales, or it is of an older version.
        """
        path, own = self.graph(precision, layout), self.variant(precision).tensorrt
        if own is not None:
            return self.file(own.path)
        if precision_spec(precision).engine_graph:
            raise BundleError(
                f"{self.directory}, {precision},",
                "has no graph for TensorRT",
                None,
                "Export the bundle again; where the graph cannot be written, the export says why.",
            )
        return path

    def verify(self, precision: str | None) -> None:
        """Read every file but those of other variants and compare its SHA-256 with the manifest.

        Args:
            precision: the variant to include, or None for none.

        Raises:
            BundleError: a file has changed since the export.
        """
        others = {
            name for other, variant in self.manifest.variants.items() if other != precision for name in variant.files
        }
        for relative, entry in self.manifest.files.items():
            if relative in others:
                continue
            path = self.file(relative)
            with _readable_file(path):
                digest = file_sha256(path)
            if digest != entry.sha256:
                raise BundleError(
                    str(self.directory / relative),
                    f"was changed or damaged: its SHA-256 is {digest}",
                    f"the manifest says {entry.sha256}",
                    "Copy or export the bundle again.",
                )

    def _check_size(self, relative: str, entry: FileEntry) -> None:
        path = self.file(relative)
        with _readable_file(path):
            size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            got = "is missing" if size is None else f"has {size} bytes"
            raise BundleError(
                str(self.directory / relative),
                got,
                f"the manifest says {entry.bytes} bytes",
                "Copy or export the bundle again.",
            )


@contextlib.contextmanager
def _readable_file(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise BundleError(
            str(path), f"cannot be read: {err.strerror or err}", None, "Check its path and its permissions."
        ) from err


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
