"""Every command on random weights in the shape of a 7B, with wall time, peak memory and disk of each step.

    python benchmarks/seven_b.py qwen-7b --scratch DIR --results DIR                # some 70 GiB of disk
    python benchmarks/seven_b.py mistral-7b --scratch DIR --results DIR             # export and golden vectors alone
    python benchmarks/seven_b.py 1.5b --scratch DIR --results DIR                   # for the growth
    python benchmarks/seven_b.py qwen-7b --layers 2 --scratch DIR --results DIR     # a rehearsal
    python benchmarks/seven_b.py 0.5b --precision int4-weights,fp8 ...              # other variants of a calibration

As on a machine with little memory, where Linux has control groups:

    systemd-run --scope -p MemoryMax=8G python benchmarks/seven_b.py qwen-7b --scratch DIR --results DIR

Each step is a command of its own. Its result is a file, RESULTS/SHAPE/STEP.json, so the same command line goes on where
an earlier run ended; delete a file to measure again. What no later step reads is deleted from SCRATCH. Ends by writing
RESULTS/seven_b.md, one table of all shapes, and RESULTS/growth.png. Machines with other work give longer times: every
result has the load that it began with.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measured_process import Measurement, measure, size_of
from seven_b_checkpoint import CONFIGS
from seven_b_report import write_report
from tokenizers import Tokenizer

from gircse.checkpoint.available_memory import available_memory
from gircse.evaluation.environment import describe_environment
from gircse.evaluation.tasks.prompts import BUILTIN
from gircse.runtime.command import comma_separated
from gircse.runtime.precision import Precision

MAKER = Path(__file__).with_name("seven_b_checkpoint.py")
STEPS_K = 4
CALIBRATION_TEXTS, EMBEDDED_TEXTS, PARITY_TEXTS = 64, 8, 20
TOKENS = 16
GROWTH_TOKENS, GROWTH_K = (64, 256), (1, 2)
LITTLE_MEMORY = "2.9"
"""GiB for the golden vectors of an export to INT8, which is to run in 3: what PyTorch takes one layer at a time."""


@dataclass(frozen=True)
class Step:
    """A command to measure.

    Attributes:
        name: of its result file.
        argv: the command.
        reads: names of the files and folders in the scratch directory that have to be there.
        writes: names of those that it makes.
        settings: what varies between steps that are compared: tokens and K.
        verdicts: exit codes that are results, not failures.
    """

    name: str
    argv: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    settings: Mapping[str, int] = field(default_factory=dict)
    verdicts: tuple[int, ...] = (0,)


def main() -> int:
    """Run what has no result yet, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=CONFIGS)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models and bundles")
    parser.add_argument("--results", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--steps", type=comma_separated(str), help="names of steps (default: all of the shape)")
    parser.add_argument("--layers", type=int, help="layers of the model (default: all)")
    parser.add_argument(
        "--precision",
        type=comma_separated(Precision),
        default=(Precision.INT8,),
        help="variants of a calibration (default: int8)",
    )
    parser.add_argument("--keep", action="store_true", help="delete nothing from the scratch folder")
    args = parser.parse_args()
    results = args.results / (args.shape if args.layers is None else f"{args.shape}-{args.layers}-layers")
    results.mkdir(parents=True, exist_ok=True)
    scratch = args.scratch / results.name
    scratch.mkdir(parents=True, exist_ok=True)
    steps = steps_of(args.shape, scratch, args.layers, args.precision)
    if args.steps and (unknown := set(args.steps) - {step.name for step in steps}):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}")
    wanted = [step for step in steps if args.steps is None or step.name in args.steps]
    failed = run_steps(steps, wanted, scratch, results, keep=args.keep)
    print(*write_report(args.results), sep="\n")
    return 1 if failed else 0


def steps_of(
    shape: str, scratch: Path, layers: int | None, precisions: Sequence[Precision] = (Precision.INT8,)
) -> list[Step]:
    """Return the steps of a shape, in the order in which they run."""
    model = ("--model", f"{scratch}/model", "--adapter", f"{scratch}/model-adapter")
    limit = () if layers is None else ("--layers", str(layers))
    export = ("gircse-export", *model, "--steps", str(STEPS_K))
    steps = [
        Step(
            "checkpoint",
            (sys.executable, str(MAKER), shape, f"{scratch}/model", *limit),
            writes=("model", "model-adapter"),
        ),
        Step(
            "export-fp16",
            (*export, "--precision", "fp16", "--output", f"{scratch}/fp16"),
            reads=("model", "model-adapter"),
            writes=("fp16",),
            settings={"tokens": TOKENS, "k": STEPS_K},
        ),
    ]
    if shape == "mistral-7b":
        return steps
    for sensitivity in ("off", "kinds"):
        steps.append(_calibration(f"calibrate-{sensitivity}", scratch, sensitivity, TOKENS, STEPS_K))
    for precision in precisions:
        steps += _variant_steps(precision, scratch, model)
    if shape == "0.5b":
        for tokens, k in (*((n, STEPS_K) for n in GROWTH_TOKENS[:1]), *((TOKENS, k) for k in GROWTH_K)):
            steps.append(_calibration(f"calibrate-off-{tokens}-tokens-k-{k}", scratch, "off", tokens, k))
    return steps


def _variant_steps(precision: Precision, scratch: Path, model: Sequence[str]) -> Iterator[Step]:
    """Yield the steps of a variant of a calibration; how it grows is measured of one alone."""
    yield Step(
        f"export-{precision}",
        (
            *("gircse-export", *model, "--steps", str(STEPS_K), "--precision", precision),
            *("--calibration", f"{scratch}/calibrate-off.json"),
            *("--output", f"{scratch}/{precision}", "--reference-memory", LITTLE_MEMORY),
        ),
        reads=("model", "model-adapter", *_calibration_files("calibrate-off")),
        writes=(str(precision),),
        settings={"tokens": TOKENS, "k": STEPS_K},
    )
    growth = (*((n, STEPS_K) for n in GROWTH_TOKENS), *((TOKENS, k) for k in GROWTH_K))
    for tokens, k in ((TOKENS, STEPS_K), *(growth if precision is Precision.INT8 else ())):
        main = (tokens, k) == (TOKENS, STEPS_K)
        name = f"embed-{precision}" if main else f"embed-{precision}-{tokens}-tokens-k-{k}"
        texts = f"texts-{EMBEDDED_TEXTS}-of-{tokens}.txt"
        argv = ("gircse-embed", f"{scratch}/{precision}", "--precision", precision, "--steps", str(k))
        files = ("--input", f"{scratch}/{texts}", "--output", f"{scratch}/{name}.npy")
        settings = {"tokens": tokens, "k": k}
        yield Step(name, (*argv, *files), ("model", str(precision), texts), (f"{name}.npy",), settings)
    texts = f"texts-{PARITY_TEXTS}-of-{TOKENS}.txt"
    parity = ("gircse-parity", f"{scratch}/{precision}", "--precision", precision, *model)
    yield Step(
        f"parity-{precision}",
        (*parity, "--texts", f"{scratch}/{texts}", "--report", f"{scratch}/parity-{precision}"),
        reads=("model", "model-adapter", str(precision), texts),
        writes=(f"parity-{precision}",),
        settings={"tokens": TOKENS, "k": STEPS_K},
        verdicts=(0, 1),  # a gate that is not passed is a result
    )


def _calibration(name: str, scratch: Path, sensitivity: str, tokens: int, k: int) -> Step:
    texts, outputs = f"texts-{CALIBRATION_TEXTS}-of-{tokens}.txt", _calibration_files(name)
    argv = (
        *("gircse-calibrate", "--model", f"{scratch}/model", "--adapter", f"{scratch}/model-adapter"),
        *("--steps", str(k), "--texts", f"{scratch}/{texts}", "--samples", str(CALIBRATION_TEXTS)),
        *("--sensitivity", sensitivity, "--output", f"{scratch}/{outputs[0]}"),
    )
    return Step(name, argv, ("model", "model-adapter", texts), outputs, {"tokens": tokens, "k": k})


def _calibration_files(name: str) -> tuple[str, str]:
    return f"{name}.json", f"{name}.moments.safetensors"


def run_steps(steps: Sequence[Step], wanted: Sequence[Step], scratch: Path, results: Path, *, keep: bool) -> bool:
    """Run the steps that have no result, and those whose output they read and that is gone.

    Args:
        steps: all of the shape.
        wanted: those to have a result.
        scratch: folder of what they write.
        results: folder of their results.
        keep: delete nothing.

    Returns:
        Whether one failed; those after it did not run.
    """
    maker = {output: step for step in steps for output in step.writes}
    to_do = [step for step in wanted if not (results / f"{step.name}.json").is_file()]
    needed = list(to_do)
    for step in needed:  # grows while it is walked
        needed += [maker[name] for name in step.reads if name in maker and not (scratch / name).exists()]
    for step in sorted(set(map(steps.index, needed))):
        if not _run(steps[step], scratch, results):
            return True
        if not keep:
            _clean_up(steps[: step + 1], [later for later in steps[step + 1 :] if later in needed], scratch)
    if not keep:
        shutil.rmtree(scratch)
    return False


def _run(step: Step, scratch: Path, results: Path) -> bool:
    for name in step.reads:
        if name.startswith("texts-"):
            _write_texts(scratch / name, scratch / "model" / "tokenizer.json")
    for name in step.writes:
        _delete(scratch / name)
    load, available = os.getloadavg()[0], available_memory()
    print(f"{step.name} ... ", end="", flush=True)
    # Of this environment, also where it is not active.
    program = shutil.which(step.argv[0], path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    measured = measure((program or step.argv[0], *step.argv[1:]), scratch)
    done = measured.exit_code in step.verdicts
    print(f"{measured.seconds:.1f} s, {measured.peak_memory / 2**30:.2f} GiB, exit code {measured.exit_code}")
    if not done:
        print(measured.output)
        return False
    content = _result(step, measured, scratch, load=load, available=available)
    partial = results / f".{step.name}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(results / f"{step.name}.json")
    return True


def _result(step: Step, measured: Measurement, scratch: Path, *, load: float, available: int) -> dict[str, Any]:
    config = json.loads((scratch / "model" / "config.json").read_text(encoding="utf-8"))
    index = json.loads((scratch / "model" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    estimate = re.search(r"estimated: ([\d.]+) min", measured.output)
    read = re.findall(r"read ([\d.]+) GiB of weights", measured.output)
    weights = next((path for name in step.reads for path in (scratch / name).glob("*/weights.bin")), None)
    return {
        "step": step.name,
        "argv": [_without_places(part, scratch) for part in step.argv],
        "parameters": index["metadata"]["total_size"] // 2,
        "layers": config["num_hidden_layers"],
        "settings": dict(step.settings),
        **dataclasses.asdict(measured),
        "output": _without_places(measured.output, scratch),
        "disk": sum(size_of(scratch / name) for name in step.writes),
        "estimated_seconds": float(estimate[1]) * 60 if estimate else None,
        "bytes_read": sum(int(float(size) * 2**30) for size in read) or None,
        "weights": weights.stat().st_size if weights else None,
        "load_at_start": load,
        "available_memory": available,
        "environment": describe_environment(),
    }


def _without_places(text: str, scratch: Path) -> str:
    """Return a text of a result without the folders of this machine."""
    for place, name in ((str(scratch), "SCRATCH"), (sys.executable, "python"), (f"{MAKER.parent}/", "")):
        text = text.replace(place, name)
    return text


def _clean_up(past: Sequence[Step], coming: Sequence[Step], scratch: Path) -> None:
    """Delete what no step reads that is still to run."""
    read = {name for step in coming for name in step.reads}
    for name in {output for step in past for output in step.writes} - read:
        _delete(scratch / name)


def _write_texts(path: Path, tokenizer_file: Path) -> None:
    """Write a file that is named ``texts-COUNT-of-TOKENS.txt``: words of the built-in English texts, shuffled."""
    count, tokens = (int(number) for number in re.findall(r"\d+", path.name))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    texts = BUILTIN.read_text(encoding="utf-8").splitlines()
    words = [word for text in texts if text.isascii() for word in text.split()]
    lines = []
    for seed in range(count):
        text = " ".join(random.Random(seed).choices(words, k=tokens))
        lines.append(tokenizer.decode(tokenizer.encode(text).ids[:tokens]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
