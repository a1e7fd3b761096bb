"""The golden vectors of a bundle in Polygraphy's JSON, for ``polygraphy run`` on graphs and engines; needs no torch.

One iteration is one golden text. Of the unrolled graph the files hold its inputs and outputs; of the stepwise graph the
prompt pass, which runs every decoder layer, with h_0 normalized in place of ``next_hidden``: golden vectors have no KV
cache for the steps, and a cosine does not see the length. Inputs of the stepwise graph have the type of its KV cache,
hence a file for each::

    unrolled-inputs.json            unrolled-outputs.json
    stepwise-float32-inputs.json    stepwise-outputs.json
    stepwise-float16-inputs.json
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gircse.reporting.files import write_files
from gircse.runtime import tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError, OutputError
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.numerics import Float32
from gircse.runtime.precision import precision_spec
from gircse.runtime.provider import Provider
from gircse.runtime.self_test import GoldenVectors, read_golden_vectors
from gircse.runtime.trt.engine_manifest import read_engines

_NO_BFLOAT16 = "its KV cache is BF16, which the numpy arrays of Polygraphy's JSON cannot be"

Arrays = Mapping[str, Any]
"""Values of a graph by name."""


@dataclass(frozen=True)
class PolygraphyFiles:
    """What was written, and what to do with it.

    Attributes:
        files: the JSON files.
        commands: for a shell, one for each graph, which ONNX Runtime runs, and for each engine.
        left_out: graphs without a command, each with the reason, a line each.
    """

    files: Sequence[Path]
    commands: Sequence[str]
    left_out: Sequence[str]


@dataclass(frozen=True)
class _Target:
    """A graph or an engine.

    Attributes:
        path: of its file.
        precision: its variant.
        layout: what it takes.
        graph: path of the ONNX graph, which tells its inputs.
        flags: of ``polygraphy run``.
        environment: put before the command.
    """

    path: Path
    precision: str
    layout: Layout
    graph: Path
    flags: Sequence[str]
    environment: str = ""


def write_polygraphy_files(bundle: Bundle, directory: Path, *, precisions: Sequence[str] = ()) -> PolygraphyFiles:
    """Write the golden inputs and outputs of a bundle.

    Args:
        bundle: with golden vectors.
        directory: where the files go; it exists.
        precisions: variants whose graphs and engines are to be run; empty means all.

    Raises:
        BundleError: the bundle has no golden vectors, lacks a precision, or nothing of it can be fed.
        OutputError: a file cannot be written.
        ModuleNotFoundError: polygraphy is not installed.
    """
    golden = read_golden_vectors(bundle)
    contents: dict[str, bytes] = {}
    commands, left_out = [], []
    for target in _targets(bundle, precisions or tuple(bundle.manifest.variants)):
        further = _further_inputs(target.graph, bundle.manifest.graph)
        if further is None:
            left_out.append(f"{target.path}: {_NO_BFLOAT16}")
            continue
        (kind, *_) = [str(array.dtype) for name, array in further.items() if tensor_names.is_cache(name)] or [""]
        stem = f"{target.layout}-{kind}" if kind else str(target.layout)
        inputs, outputs = f"{stem}-inputs.json", f"{target.layout}-outputs.json"
        if inputs not in contents:
            contents[inputs] = _inputs_json(golden, further)
        if outputs not in contents:
            contents[outputs] = _outputs_json(golden, target.layout)
        commands.append(_command(target, directory / inputs, directory / outputs))
    if not commands:
        raise BundleError(
            str(bundle.directory),
            f"has nothing to be fed: {left_out[0]}",
            None,
            "Choose another --precision, or export with --layout unrolled.",
        )
    try:
        files = write_files(contents, directory)
    except OSError as err:
        raise OutputError(f"--polygraphy {directory}", f"cannot be written: {err.strerror or err}") from err
    return PolygraphyFiles(files, commands, left_out)


def _targets(bundle: Bundle, precisions: Sequence[str]) -> Iterator[_Target]:
    for precision in precisions:
        spec = precision_spec(precision)
        provider = [] if spec.cpu else ["--providers", "cuda"]
        for layout in sorted(bundle.variant(precision).graphs):
            path = bundle.graph(precision, layout)
            yield _Target(path, precision, layout, path, ["--onnxrt", *provider])
    for manifest, plan in read_engines(bundle):
        if manifest.precision in precisions and not manifest.request.layer_outputs:
            graph = bundle.engine_graph(manifest.precision, manifest.layout)
            is_rtx = manifest.provider is Provider.TENSORRT_RTX
            environment = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if is_rtx else ""
            yield _Target(
                plan, manifest.precision, manifest.layout, graph, ["--model-type", "engine", "--trt"], environment
            )


def _further_inputs(path: Path, facts: GraphFacts) -> dict[str, Any] | None:
    """Return what a graph reads besides a prompt, without elements: there is no past; None if it is BF16."""
    inputs: dict[str, Any] = {}
    for value in ir.load(path).graph.inputs:
        if value.name in (tensor_names.INPUT_IDS, tensor_names.ATTENTION_MASK):
            continue
        if value.dtype is ir.DataType.BFLOAT16:
            return None
        width = facts.kv_size if tensor_names.is_cache(str(value.name)) else facts.hidden_size
        dtype = np.float16 if value.dtype is ir.DataType.FLOAT16 else np.float32
        inputs[str(value.name)] = np.empty((1, 0, width), dtype)
    return inputs


def _inputs_json(golden: GoldenVectors, further: Arrays) -> bytes:
    from polygraphy.json import to_json

    iterations = []
    for ids in golden.token_ids:
        array = np.array([ids], np.int64)
        prompt = {tensor_names.INPUT_IDS: array, tensor_names.ATTENTION_MASK: np.ones_like(array)}
        iterations.append({**prompt, **further})
    return bytes(to_json(iterations), "ascii")


def _outputs_json(golden: GoldenVectors, layout: Layout) -> bytes:
    from polygraphy.comparator import IterationResult, RunResults

    name = "PyTorch FP32 (golden vectors)"
    results = [IterationResult(dict(_outputs(vectors, layout)), runner_name=name) for vectors in golden.vectors]
    return bytes(RunResults([(name, results)]).to_json(), "ascii")


def _outputs(vectors: Float32, layout: Layout) -> Arrays:
    """Return the outputs of a graph for one text, of whose vectors (K + 1, hidden) the first is h_0 normalized."""
    if layout is Layout.STEPWISE:
        return {tensor_names.NEXT_HIDDEN: vectors[None, :1]}
    steps = {tensor_names.STEP_EMBEDDINGS: vectors[None, 1:]} if len(vectors) > 1 else {}
    return {tensor_names.EMBEDDING: vectors[-1:], **steps, tensor_names.PROMPT_EMBEDDING: vectors[:1]}


def _command(target: _Target, inputs: Path, outputs: Path) -> str:
    limit = precision_spec(target.precision).self_test_min_cosine
    files = ["--load-inputs", str(inputs), "--load-outputs", str(outputs)]
    judge = ["--compare", "cosine_similarity", "--cosine-similarity-threshold", f"{limit:g}"]
    return target.environment + shlex.join(["polygraphy", "run", str(target.path), *target.flags, *files, *judge])
