"""A benchmark runs what can be compared, and refuses the rest before anything is measured."""

import shutil
from pathlib import Path

import pytest
from support.small_models import SmallModels, add_stepwise_variants, edit_manifest, scale_weights

from gircse.evaluation.bench.run import BenchOptions, run_bench
from gircse.evaluation.bench.worker import Worker
from gircse.runtime import BundleError, MeasurementError
from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, Int64


def test_a_variant_without_the_unrolled_graph_runs_stepwise(small_models: SmallModels, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small_models.bundle("llama"), tmp_path / "bundle"))
    add_stepwise_variants(bundle, "int8")
    small = {"batches": (1,), "tokens": (4,), "repeats": 3, "threads": 1}
    with pytest.raises(BundleError, match=r"int8.*unrolled.*stepwise"):
        run_bench(BenchOptions([bundle], layout=Layout.UNROLLED, precisions=("fp32", "int8"), **small))
    for layout, measured in (
        (None, {(f"bundle:{precision}", steps) for precision in ("fp32", "int8") for steps in (1, 5)}),
        (Layout.UNROLLED, {("bundle:fp32", 5)}),  # it runs K steps whatever is asked, so only K is measured
    ):
        report = run_bench(BenchOptions([bundle], layout=layout, steps=(1, 5), **small))
        assert {(entry.backend, entry.steps) for entry in report.latencies} == measured


def test_an_instruction_comes_before_every_text_and_is_also_cached(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: set[int] = set()
    run = Worker.run

    def counted(worker: Worker, input_ids: Int64, steps: int) -> tuple[float, Float32]:
        lengths.add(input_ids.shape[1])
        return run(worker, input_ids, steps)

    monkeypatch.setattr(Worker, "run", counted)
    bundle = small_models.bundle("llama")
    small = {"batches": (1, 2), "tokens": (4,), "steps": (5,), "repeats": 3, "threads": 1}
    instruction = "Given a question, retrieve passages that answer it"
    report = run_bench(BenchOptions([bundle], layout=Layout.STEPWISE, instruction=instruction, **small))
    assert [cost.backend for cost in report.backends] == [
        f"{bundle.name}:fp32",
        f"{bundle.name}:fp32, cached instruction",
    ]
    assert report.backends[1].min_cosine == pytest.approx(1, abs=1e-6)
    assert lengths == {report.instruction_tokens + 4}
    assert report.instruction_tokens > 8
    unrolled = run_bench(BenchOptions([bundle], layout=Layout.UNROLLED, instruction=instruction, **small))
    assert len(unrolled.backends) == 1
    for options, message in (
        ({"instruction": instruction * 99}, r"--instruction has \d+ tokens; the bundle takes"),
        ({"instruction": instruction, "tokens": (60,)}, "--tokens is 60; the range is 1 to "),
    ):
        with pytest.raises(OptionError, match=message):
            run_bench(BenchOptions([bundle], **{**small, **options}))


def test_bundles_of_another_vocabulary_are_refused(small_models: SmallModels, tmp_path: Path) -> None:
    bundle = small_models.bundle("llama")
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    edit_manifest(other, lambda manifest: manifest["graph"].update(vocab_size=521))
    with pytest.raises(MeasurementError, match=r"has a vocabulary of 521; .* has 520"):
        run_bench(BenchOptions([bundle, other]))


def test_backends_need_different_names(small_models: SmallModels, tmp_path: Path) -> None:
    bundle = small_models.bundle("llama")
    same_name = Path(shutil.copytree(bundle, tmp_path / bundle.name))
    with pytest.raises(OptionError, match=f"the name {bundle.name}:fp32 belongs to two backends"):
        run_bench(BenchOptions([bundle, same_name]))


def test_the_worst_agreement_of_a_backend_is_reported(small_models: SmallModels, tmp_path: Path) -> None:
    bundle = small_models.bundle("llama")
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    scale_weights(other, 0.3, 0.6, 2.0)
    report = run_bench(BenchOptions([bundle, other], batches=(1, 2), tokens=(4,), steps=(5,), repeats=3, threads=1))
    same, different = (backend.min_cosine for backend in report.backends)
    assert different < 0.99 < same
