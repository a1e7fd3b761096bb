"""Writes a model repository: a folder for each model, with its ``config.pbtxt`` and the version ``1``.

    REPOSITORY/
      NAME/       config.pbtxt, 1/model.py; bundle/ if copied    texts to vectors, in the Python backend
      NAME_onnx/  config.pbtxt, 1/model.onnx and its weights     token ids to vectors, in ONNX Runtime
      NAME_plan/  config.pbtxt, 1/ENGINE.plan                    token ids to vectors, in TensorRT

Nothing of the bundle is copied unless that is asked for: the configuration of the first names it, and the version of
the other two is a link to the folder of the graph or the engines.
"""

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import OutputError
from gircse.runtime.manifest import MANIFEST_NAME
from gircse.runtime.trt.engine_manifest import ENGINES_FOLDER
from gircse.serving.triton_server.models import (
    ModelKind,
    ModelOptions,
    RepositoryModel,
    onnx_model,
    plan_model,
    text_model,
)

VERSION = "1"
COPY_NAME = "bundle"
"""Folder of a copied bundle, in that of the model: Triton passes over folders that are no version."""

MODEL_PY = '''\
"""The code is in the installed package, so that pip upgrades it."""

from gircse.serving.triton_server.python_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    path: Path, bundle: Bundle, kinds: Sequence[ModelKind], options: ModelOptions, *, copy: bool
) -> list[RepositoryModel]:
    """Write a model repository that is complete or not there.

    Args:
        path: folder to make; an empty one may be there.
        bundle: an opened bundle.
        kinds: the models to write.
        options: how they run.
        copy: copy what they need of the bundle.

    Returns:
        The models, in the order of ``kinds``.

    Raises:
        OutputError: something else is there.
        GircseError: the bundle does not have what a model needs (see ``models``).
    """
    location = COPY_NAME if copy else str(bundle.directory)
    with _written_whole(path) as folder:
        models = []
        for kind in kinds:
            if kind is ModelKind.TEXT:
                model = text_model(bundle, options, location=location)
            else:
                model = onnx_model(bundle, options) if kind is ModelKind.ONNX else plan_model(bundle, options)
            _write(folder / model.config.name, model, copy=copy)
            if kind is ModelKind.TEXT and copy:
                _copy_bundle(bundle, folder / model.config.name / COPY_NAME)
            models.append(model)
    return models


def _write(folder: Path, model: RepositoryModel, *, copy: bool) -> None:
    version = folder / VERSION
    folder.mkdir()
    (folder / "config.pbtxt").write_text(model.config.to_pbtxt(), encoding="utf-8")
    if model.source is not None and not copy:
        version.symlink_to(model.source, target_is_directory=True)
        return
    version.mkdir()
    if model.source is None:
        (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
    else:
        for name in model.files:
            shutil.copyfile(model.source / name, version / name)


def _copy_bundle(bundle: Bundle, folder: Path) -> None:
    """Copy the files that the manifest lists, and the engines."""
    for name in (MANIFEST_NAME, *bundle.manifest.files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.file(name), folder / name)
    for suffix in ("plan", "json"):
        for engine in (bundle.directory / ENGINES_FOLDER).glob(f"*.{suffix}"):
            (folder / ENGINES_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(engine, folder / ENGINES_FOLDER / engine.name)


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` if the block succeeds and is deleted if it fails."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(str(path), "exists and is no folder", None, "Choose another --output.")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(str(path), "exists and is not empty", None, "Choose another --output, or delete it.")
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
