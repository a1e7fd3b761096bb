"""Quality of a bundle's INT8 variants and of three baselines, on the same texts and calibrated with the same texts.

    pip install nvidia-modelopt    # not part of any extra of ours
    python benchmarks/int8_baselines.py gircse-demo-8 --calibration-texts calibration.txt.gz --texts texts.txt \
        --sts stsb_dev.tsv.gz

Baselines, each in the ways that its documentation gives for matrix products:
    quantize_dynamic  ONNX Runtime: weights per channel, the scale of an activation from the values at hand
    quantize_static   ONNX Runtime: QDQ, weights per channel, the scale of an activation from a calibration
    modelopt          NVIDIA Model Optimizer: SmoothQuant, W8A8 fake-quantized in PyTorch

Each row is measured against the bundle's FP32 vectors at K: rank correlation of the similarities of all pairs, share of
common ten nearest neighbors, smallest cosine; with --sts also the Spearman correlation of the task. ``products`` says
how many of the graph's matrix products have two INT8 operands, those inside attention not counted. What a tool makes
and cannot run, or refuses to make, is a row with its message. Every backend gets the same batches (at most 32 texts, by
length). The calibration texts are those of ``gircse-calibrate --samples`` with the same number, one at a time, so that
no padding is calibrated on. The tools write several copies of the graph where TMPDIR points to.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from gircse.checkpoint.reference import load_reference, refine, step_states
from gircse.evaluation.parity.references import source_checkpoint
from gircse.evaluation.tasks.files import STS_INSTRUCTION, read_sts
from gircse.evaluation.tasks.prompts import Prompt, read_prompts, tokenize_prompts
from gircse.evaluation.tasks.scoring import StsTask
from gircse.reporting.similarity import neighbor_overlap, pairwise_rank_correlation
from gircse.runtime import Embedder, tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.command import comma_separated
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.numerics import Float32, row_cosine
from gircse.runtime.ort_session import StepwiseSession, load_graph, open_session
from gircse.runtime.precision import precision_spec
from gircse.runtime.session import Session, StepOutputs, step_outputs

PACKAGES = {"quantize_dynamic": "onnxruntime", "quantize_static": "onnxruntime", "modelopt": "nvidia-modelopt"}
SMOOTHQUANT_ALPHAS = (1.0, 0.5)
"""Model Optimizer's default, and the SmoothQuant paper's."""

SEED = 0
"""Chooses the calibration texts; the default of ``gircse-calibrate``."""

NAME_WIDTH = 62
Feed = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What a baseline quantizes.

    Attributes:
        bundle: the bundle.
        graph: a copy of its FP32 stepwise graph and weights, next to which the tools may write.
        calibration: token ids of each calibration text.
    """

    bundle: Bundle
    graph: Path
    calibration: Sequence[list[int]]


@dataclass(frozen=True)
class Backend:
    """Something that embeds, and how many of its matrix products are INT8."""

    session: Session
    products: str = ""


Way = tuple[str, Callable[[Path], Backend]]
"""Name of a way to quantize, and the function that does it; it may write into the folder that it is given."""


def main() -> None:
    """Compare the bundle's own INT8 variants, then the baselines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="bundle with FP32 graphs")
    parser.add_argument(
        "--calibration-texts", type=Path, required=True, metavar="FILE", help="one text per line, may be .gz"
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration texts to draw from the file")
    parser.add_argument(
        "--texts", type=Path, required=True, metavar="FILE", help="texts to compare on, one text per line"
    )
    parser.add_argument("--sts", type=Path, metavar="FILE", help="scored pairs, TSV: score, sentence1, sentence2")
    parser.add_argument(
        "--precision",
        type=comma_separated(str),
        metavar="P,...",
        help="the bundle's own variants to compare (default: its INT8 ones)",
    )
    parser.add_argument(
        "--against",
        type=comma_separated(baseline),
        default=tuple(PACKAGES),
        metavar=",".join(PACKAGES),
        help="baselines (default: all)",
    )
    args = parser.parse_args()

    bundle = Bundle.open(args.bundle)
    own = args.precision
    if own is None:
        own = [precision for precision in bundle.manifest.variants if precision_spec(precision).calibrated]
    texts, calibration = read_prompts(args.texts), draw(read_prompts(args.calibration_texts), args.samples)
    sts = read_sts(args.sts, instruction=STS_INSTRUCTION) if args.sts else None
    print(f"{versions()}; K = {bundle.manifest.graph.steps}, {len(texts)} texts, {len(calibration)} calibration texts")
    with tempfile.TemporaryDirectory() as scratch:
        comparison = Comparison(bundle, texts, sts)
        for precision in own:
            session = open_session(bundle, precision, layout=Layout.STEPWISE)
            comparison.print_row(f"{bundle.directory.name}:{precision}", Backend(session))
        token_ids = tokenize_prompts(comparison.embedder(Backend(comparison.fp32)).tokenizer, calibration)
        setup = Setup(bundle, copy_graph(bundle, Path(scratch)), token_ids)
        for name in args.against:
            print_baseline(name, setup, comparison)


def baseline(name: str) -> str:
    """Return the name of a baseline, for the command line; a ValueError where there is none."""
    if name not in PACKAGES:
        raise ValueError(f"{name!r} is not one of {', '.join(PACKAGES)}")
    return name


def print_baseline(baseline: str, setup: Setup, comparison: "Comparison") -> None:
    """Print a row for every way of a baseline as it is done."""
    try:
        for name, make in WAYS[baseline](setup):
            with tempfile.TemporaryDirectory(dir=setup.graph.parent) as folder:
                try:
                    with redirect_stdout(sys.stderr):  # the tools talk
                        backend = make(Path(folder))
                    comparison.print_row(f"{baseline}: {name}", backend)
                except Exception as err:  # the failure of a tool is a result
                    lines = [line for line in str(err).splitlines() if line.strip()] or [""]
                    print(f"{baseline + ': ' + name:{NAME_WIDTH}} fails: {type(err).__name__}: {lines[0]}", flush=True)
    except ImportError as err:
        print(f"{baseline}: {err}. Install it: pip install {PACKAGES[baseline]}", flush=True)


class Comparison:
    """Holds what every backend is compared with, and prints the rows."""

    def __init__(self, bundle: Bundle, texts: Sequence[Prompt], sts: StsTask | None) -> None:
        """Embed the texts in FP32 and print the header and the first row."""
        self._bundle, self._texts, self._sts = bundle, texts, sts
        self.fp32 = open_session(bundle, "fp32", layout=Layout.STEPWISE)
        self._reference = self._embed(Backend(self.fp32), texts)
        columns = f"{'products':>11} {'rank corr.':>11} {'top-10':>7} {'min. cosine':>12}"
        print(f"{'':{NAME_WIDTH}} {columns}{'  STS' if sts else ''}")
        self.print_row(f"{bundle.directory.name}:fp32", Backend(self.fp32))

    def print_row(self, name: str, backend: Backend) -> None:
        """Embed with a backend and print how far it is from FP32."""
        vectors = self._embed(backend, self._texts)
        if not np.isfinite(vectors).all():
            raise ValueError(f"{name}: NaN or infinity in the vectors")
        correlation = pairwise_rank_correlation(vectors, self._reference)
        overlap = neighbor_overlap(vectors, self._reference)
        cosine = row_cosine(vectors, self._reference).min()
        row = f"{name:{NAME_WIDTH}} {backend.products:>11} {correlation:11.4f} {overlap:7.3f} {cosine:12.4f}"
        if self._sts:
            row += f" {self._sts.score(self._embed(backend, self._sts.prompts)):.4f}"
        print(row, flush=True)

    def embedder(self, backend: Backend) -> Embedder:
        """Return the runtime around a backend."""
        return Embedder.from_session(self._bundle, backend.session, precision="fp32")

    def _embed(self, backend: Backend, prompts: Sequence[Prompt]) -> Float32:
        embedder = self.embedder(backend)
        token_ids = tokenize_prompts(embedder.tokenizer, prompts)
        result = np.empty((len(prompts), self._bundle.manifest.graph.hidden_size), np.float32)
        for rows, outputs in embedder.run_batches(token_ids):
            result[list(rows)] = outputs.step_embeddings[:, -1]
        return result


def dynamic_ways(setup: Setup) -> Iterator[Way]:
    """Give ONNX Runtime's dynamic quantization its default operators, then what is left of them."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    def way(operators: Sequence[str], *, reduce_range: bool = False) -> Callable[[Path], Backend]:
        def make(folder: Path) -> Backend:
            quantize_dynamic(
                setup.graph,
                folder / "graph.onnx",
                op_types_to_quantize=operators,
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
            return onnx_backend(folder / "graph.onnx", setup.bundle.manifest.graph)

        return make

    yield "default operators", way(list(IntegerOpsRegistry))
    yield "default but Attention", way([name for name in IntegerOpsRegistry if name != "Attention"])
    yield "MatMul", way(["MatMul"])
    yield "MatMul, 7-bit weights (reduce_range)", way(["MatMul"], reduce_range=True)


def static_ways(setup: Setup) -> Iterator[Way]:
    """Give ONNX Runtime's static quantization its default operators, then fewer and fewer.

    The ranges of the first way, which sees the tensors of all others, serve every way of the MinMax calibrator.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    facts = setup.bundle.manifest.graph

    def way(
        operators: Sequence[str],
        *,
        outputs: bool = True,
        exclude: Sequence[str] = (),
        method: Any = CalibrationMethod.MinMax,
    ) -> Callable[[Path], Backend]:
        def make(folder: Path) -> Backend:
            min_max = method is CalibrationMethod.MinMax
            # The histogram calibrators stack all arrays of a tensor, which one pass at a time have one shape.
            options = {} if min_max else {"CalibStridedMinMax": 1}
            quantize_static(
                setup.graph,
                folder / "graph.onnx",
                StepwiseFeeds(setup),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=operators,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(exclude),
                use_external_data_format=True,
                calibrate_method=method,
                extra_options=options | ({} if outputs else {"OpTypesToExcludeOutputQuantization": list(operators)}),
                calibration_cache_path=setup.graph.with_name("ranges.json") if min_max else None,
            )
            return onnx_backend(folder / "graph.onnx", facts)

        return make

    operators = sorted({*QLinearOpsRegistry, *QDQRegistry})
    products = onnx.load(setup.graph, load_external_data=False).graph.node
    vocabulary = [node.name for node in products if not node.name.startswith(tensor_names.DECODER_PREFIX)]
    down = [node.name for node in products if any(".down_proj." in name for name in node.input)]
    yield "default operators", way(operators)
    yield "default but Gather", way([name for name in operators if name != "Gather"])
    yield "MatMul", way(["MatMul"])
    yield "MatMul inputs", way(["MatMul"], outputs=False)
    yield "MatMul inputs, Percentile", way(["MatMul"], outputs=False, method=CalibrationMethod.Percentile)
    yield "MatMul inputs, Entropy", way(["MatMul"], outputs=False, method=CalibrationMethod.Entropy)
    yield "MatMul inputs, vocabulary FP32", way(["MatMul"], outputs=False, exclude=vocabulary)
    yield "MatMul inputs, vocabulary and down_proj FP32", way(["MatMul"], outputs=False, exclude=vocabulary + down)


def modelopt_ways(setup: Setup) -> Iterator[Way]:
    """Smooth and fake-quantize the checkpoint that the bundle was exported from."""
    import modelopt.torch.quantization as mtq

    facts = setup.bundle.manifest.graph

    def run_calibration(model: Any) -> None:
        for ids in setup.calibration:
            prompt = torch.tensor([ids])
            states = refine(model, prompt, torch.ones_like(prompt), steps=facts.steps, temperature=facts.temperature)
            for _ in states:
                pass

    def way(alpha: float) -> Callable[[Path], Backend]:
        def make(_: Path) -> Backend:
            model = load_reference(source_checkpoint(setup.bundle.manifest))
            config = deepcopy(mtq.INT8_SMOOTHQUANT_CFG) | {"algorithm": {"method": "smoothquant", "alpha": alpha}}
            mtq.quantize(model, config, run_calibration)
            linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
            done = sum(each.input_quantizer.is_enabled and each.weight_quantizer.is_enabled for each in linear)
            mtq.fold_weight(model)  # the same values, not rounded anew in every pass
            # One more product: the soft-token embedding.
            return Backend(TorchSession(model, facts), f"{done} of {len(linear) + 1}")

        return make

    for alpha in SMOOTHQUANT_ALPHAS:
        yield f"INT8_SMOOTHQUANT_CFG, alpha {alpha}", way(alpha)


WAYS: dict[str, Callable[[Setup], Iterator[Way]]] = {
    "quantize_dynamic": dynamic_ways,
    "quantize_static": static_ways,
    "modelopt": modelopt_ways,
}


class StepwiseFeeds:
    """The inputs of every pass of every calibration text, made by the FP32 graph: a ``CalibrationDataReader``.

    The first pass takes the prompt and the first soft token together, the others a soft token each, so the tensors
    hold just what they hold in the prompt pass and in the K steps. In a pass of the prompt alone the vocabulary
    products are empty, and the histogram calibrators have no maximum of nothing.
    """

    def __init__(self, setup: Setup) -> None:
        self._facts, self._token_ids = setup.bundle.manifest.graph, setup.calibration
        self._graph = load_graph(setup.graph)
        self._feeds = self._all_feeds()
        self._left = len(self)

    def __len__(self) -> int:
        """Return the number of passes."""
        return len(self._token_ids) * self._facts.steps

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give the next ``end_index - start_index`` passes."""
        self._left = end_index - start_index

    def get_next(self) -> Feed | None:
        """Return the inputs of the next pass; None at the end of the range."""
        if not self._left:
            return None
        self._left -= 1
        return next(self._feeds)

    def _all_feeds(self) -> Iterator[Feed]:
        past, present = (tensor_names.cache_names(prefix, self._facts.num_layers) for prefix in ("past", "present"))
        nothing = np.empty((1, 0, self._facts.hidden_size), np.float32)
        no_past = dict.fromkeys(past, np.empty((1, 0, self._facts.kv_size), np.float32))
        for ids in self._token_ids:
            prompt, mask = np.array([ids]), np.ones((1, len(ids)), np.int64)
            feed = {
                tensor_names.INPUT_IDS: prompt,
                tensor_names.HIDDEN: nothing,
                tensor_names.ATTENTION_MASK: mask,
                **no_past,
            }
            (hidden,) = self._graph.run([tensor_names.NEXT_HIDDEN], feed)
            cache = no_past
            for _ in range(self._facts.steps):
                mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
                feed = {
                    tensor_names.INPUT_IDS: prompt,
                    tensor_names.HIDDEN: hidden,
                    tensor_names.ATTENTION_MASK: mask,
                    **cache,
                }
                yield feed
                hidden, *values = self._graph.run([tensor_names.NEXT_HIDDEN, *present], feed)
                prompt, cache = prompt[:, :0], dict(zip(past, values, strict=True))


class TorchSession:
    """A ``transformers`` model in place of a graph."""

    def __init__(self, model: Any, facts: GraphFacts) -> None:
        self._model, self._facts = model, facts

    def run(self, input_ids: Any, attention_mask: Any, *, steps: int) -> StepOutputs:
        """Embed one batch; (batch, tokens) int64 each."""
        ids, mask = torch.from_numpy(input_ids), torch.from_numpy(attention_mask)
        states = step_states(self._model, ids, mask, steps=steps, temperature=self._facts.temperature)
        return step_outputs(states.numpy(), self._facts.pooling)

    def max_batch(self, tokens: int) -> int | None:
        """Return None: any batch that memory holds."""
        return None


def onnx_backend(path: Path, facts: GraphFacts) -> Backend:
    """Load a quantized stepwise graph, and count its matrix products of two INT8 operands."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    done = [
        node.op_type == "MatMulInteger" or dequantized.issuperset(node.input[:2])
        for node in nodes
        if node.op_type in ("MatMul", "Gemm", "MatMulInteger")
    ]
    return Backend(StepwiseSession(load_graph(path), facts), f"{sum(done)} of {len(done)}")


def copy_graph(bundle: Bundle, directory: Path) -> Path:
    """Copy the FP32 stepwise graph with its weights: the tools write their own files next to what they read."""
    model = onnx.load(bundle.graph("fp32", Layout.STEPWISE))
    path = directory / "fp32.onnx"
    onnx.save_model(model, path, save_as_external_data=True)
    return path


def draw(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Draw so many prompts, the same that ``gircse-calibrate`` draws."""
    return [prompts[row] for row in np.random.default_rng(SEED).permutation(len(prompts))[:count]]


def versions() -> str:
    """Return the versions of what computes."""
    found = []
    for package in ("onnxruntime", "nvidia-modelopt", "torch", "transformers"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
