"""The calibration from end to end, as a list of stages. ``calibrate`` is what ``gircse-calibrate`` calls.

StepBindings 1 streams the texts through the reference for channel ranges, sampled rows and the mixture's tail; smoothing is
searched on those. A method that clips needs a second pass, for histograms of the smoothed inputs. The weights are rounded
by the inputs' second moments, which are written beside the file, and the sensitivity is measured on texts that were left
out.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from gircse.calibration.calibration_file import (
    SCHEMA_VERSION,
    Calibration,
    InputCalibration,
    ModelFingerprint,
    SoftTokenCalibration,
    TextsUsed,
)
from gircse.calibration.fingerprint import fingerprint_of
from gircse.calibration.int8.fake_quantization import round_weights
from gircse.calibration.int8.gptq import RoundedWeight
from gircse.calibration.int8.histogram import MagnitudeHistogram
from gircse.calibration.int8.scheme import (
    LIMBS,
    OUTLIER_CHANNELS,
    SMOOTHED,
    InputKind,
    QuantizedInput,
    decoder_inputs,
)
from gircse.calibration.int8.smoothing import MIGRATIONS, Migrations, Smoothing, range_without, search_smoothing
from gircse.calibration.int8.thresholds import Method, threshold
from gircse.calibration.moments_file import moments_content, moments_path
from gircse.calibration.observe import TOP_K, Observer, run_batch, watched
from gircse.calibration.resume import ResumeState
from gircse.calibration.sensitivity import SensitivityStudy, measure_sensitivity
from gircse.checkpoint.model_settings import ModelSettings, check_range
from gircse.checkpoint.reference import load_reference
from gircse.checkpoint.source import Checkpoint, pad_token_id, resolve_checkpoint
from gircse.reporting.progress import StageProgress
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import CheckpointError
from gircse.runtime.text_files import read_texts
from gircse.runtime.tokenization import TokenBatch, load_tokenizer, padded_batches, tokenize

MIN_TEXTS = 32
"""Fewer different texts say too little about ranges, and leave none to evaluate_gates on."""

HELD_OUT_TEXTS, HELD_OUT_TOKENS = 64, 32
"""Texts, and tokens of each, that the sensitivity is measured on."""

BATCH_SIZE, BATCH_TOKENS = 16, 2048
TOOLS = ("gircse-deploy", "torch", "transformers", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(ModelSettings):
    """What to calibrate, and how; the fields are the flags of ``gircse-calibrate``.

    Attributes:
        texts: file of one text a line.
        output: the file to write.
        method: how thresholds are chosen.
        smooth: migration strength of every input, or None to search one for each.
        samples: most texts to use.
        seed: chooses the texts and the sampled rows.
        max_drop: largest loss of rank correlation before inputs are excluded from quantization.
    """

    texts: Path
    output: Path
    method: Method = Method.MAX
    smooth: float | None = None
    samples: int = 512
    seed: int = 0
    max_drop: float = 0.005

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            OptionError: a flag is out of its range.
        """
        super().__post_init__()
        check_range("--samples", self.samples, self.samples >= MIN_TEXTS, f"at least {MIN_TEXTS}")
        check_range("--smooth", self.smooth, self.smooth is None or 0 <= self.smooth <= 1, "0 to 1, or auto")
        check_range("--max-drop", self.max_drop, 0 <= self.max_drop <= 1, "0 to 1")


@dataclass(frozen=True)
class _Corpus:
    """Token ids to observe and to evaluate_gates on, and the record of the former."""

    observed: tuple[TokenBatch, ...]
    held_out: tuple[TokenBatch, ...]
    used: TextsUsed


def calibrate(options: CalibrationOptions, *, progress: StageProgress | None = None) -> Calibration:
    """Calibrate a model and write the file.

    Args:
        options: what to calibrate, and how.
        progress: where to show the stages; None makes one on stderr.

    Returns:
        What was written.

    Raises:
        CheckpointError: model, adapter or texts cannot be used, or the file cannot be written.
    """
    progress = progress or StageProgress()
    texts = read_texts(options.texts)
    _check_output(options.output)
    with progress.stage(f"find the model {options.model}"):
        checkpoint = resolve_checkpoint(options.model, adapter=options.adapter, revision=options.revision)
        fingerprint = fingerprint_of(checkpoint, options)
        corpus = _prepare(texts, checkpoint, options)
    with progress.stage("load the PyTorch reference"):
        model = load_reference(checkpoint)
    sites = decoder_inputs(model.config.num_hidden_layers)
    if not options.steps:
        sites = tuple(site for site in sites if site.kind is not InputKind.VOCABULARY)
    try:
        observer = _observe(model, sites, corpus, fingerprint, options, progress)
        calibrations = _calibrate_inputs(model, sites, observer, corpus, options, progress)
        mixture = _mixture(model, observer) if options.steps else None
        weights: dict[str, RoundedWeight] = {}
        with progress.stage("round the weights", total=len(sites)) as advance:
            for site in sites:
                moments = observer.moments.get(site.name)
                weights |= round_weights(model, site, calibrations[site.name], moments)
                advance(1)
        study = SensitivityStudy(
            model,
            sites,
            calibrations,
            weights,
            mixture,
            corpus.held_out,
            options.steps,
            options.pooling,
            options.temperature,
        )
        sensitivity = measure_sensitivity(study, max_drop=options.max_drop, progress=progress)
        content = moments_content(observer.moments)
        calibration = Calibration(
            schema_version=SCHEMA_VERSION,
            fingerprint=fingerprint,
            texts=corpus.used,
            method=options.method,
            max_tokens=options.max_tokens,
            max_drop=options.max_drop,
            inputs=calibrations,
            soft_token=mixture,
            moments_sha256=hashlib.sha256(content).hexdigest(),
            sensitivity=sensitivity,
            tools={name: importlib.metadata.version(name) for name in TOOLS},
        )
        with atomic_write(options.output) as file, atomic_write(moments_path(options.output)) as beside:
            file.write(calibration.to_json())
            file.flush()  # a full disk shows before the other file appears
            beside.write(content)
    except OSError as err:
        raise CheckpointError(
            f"--output {options.output}: {err.strerror or err} | room and permission to write | free some space or choose "
            "another --output; what was observed so far is kept beside it"
        ) from err
    _resume_state(options, fingerprint, corpus, "").remove()
    return calibration


def _check_output(path: Path) -> None:
    """See that the folder can be written before the long work, not after it."""
    try:
        with atomic_write(path.parent / f"{path.name}.partial.test"):
            pass
        (path.parent / f"{path.name}.partial.test").unlink()
    except OSError as err:
        raise CheckpointError(
            f"--output {path}: {err.strerror} | a file in a folder that can be written | choose another"
        ) from err


def _prepare(texts: Sequence[str], checkpoint: Checkpoint, options: CalibrationOptions) -> _Corpus:
    """Draw the texts to observe and, from the rest if there is one, those to evaluate_gates on."""
    different = list(dict.fromkeys(texts))
    if len(different) < MIN_TEXTS:
        raise CheckpointError(
            f"--texts {options.texts}: {len(different)} different texts | at least {MIN_TEXTS} | add texts of the kind "
            "that will be embedded"
        )
    order = np.random.default_rng(options.seed).permutation(len(different))
    tokenizer: Tokenizer = load_tokenizer(checkpoint.directory / "tokenizer.json")
    pad = pad_token_id(checkpoint.directory, tokenizer.get_vocab())
    observed = [different[row] for row in order[: options.samples]]
    held_out = [different[row] for row in order[options.samples :][:HELD_OUT_TEXTS]]
    if len(held_out) < MIN_TEXTS:
        held_out = observed[-HELD_OUT_TEXTS:]

    def batches(chosen: Sequence[str], most_tokens: int) -> tuple[TokenBatch, ...]:
        ids = [found[:most_tokens] for found in tokenize(tokenizer, chosen, empty_token_id=pad)]
        return tuple(padded_batches(ids, pad_token_id=pad, batch_size=BATCH_SIZE, batch_tokens=BATCH_TOKENS))

    seen = batches(observed, options.max_tokens)
    digest = hashlib.sha256("\n".join(observed).encode()).hexdigest()
    tokens = sum(int(batch.attention_mask.sum()) for batch in seen)
    return _Corpus(seen, batches(held_out, HELD_OUT_TOKENS), TextsUsed(digest, len(observed), tokens, options.seed))


def _calibrate_inputs(
    model: Any,
    sites: tuple[QuantizedInput, ...],
    observer: Observer,
    corpus: _Corpus,
    options: CalibrationOptions,
    progress: StageProgress,
) -> dict[str, InputCalibration]:
    """Smooth, and choose thresholds."""
    with progress.stage("search the smoothing", total=len(sites)) as advance:
        smoothings = {}
        for site in sites:
            smoothings[site.name] = _smooth(model, site, observer, options)
            advance(1)
    if options.method is not Method.MAX:
        histograms = _fill_histograms(model, sites, smoothings, corpus, options, progress)
    calibrations = {}
    for site in sites:
        smoothing = smoothings[site.name]
        ranges = [
            range_without(maxima / smoothing.scales, smoothing.outlier_channels)
            for maxima in observer.channel_maxima[site.name]
        ]
        chosen = ranges
        if options.method is not Method.MAX:
            chosen = [threshold(histogram, options.method) for histogram in histograms[site.name]]
        calibrations[site.name] = _input_calibration(smoothing, ranges, chosen)
    return calibrations


def _mixture(model: Any, observer: Observer) -> SoftTokenCalibration:
    return SoftTokenCalibration(min(TOP_K, model.config.vocab_size), tuple(_rounded(observer.tail().tolist())))


def _observe(
    model: Any,
    sites: tuple[QuantizedInput, ...],
    corpus: _Corpus,
    fingerprint: ModelFingerprint,
    options: CalibrationOptions,
    progress: StageProgress,
) -> Observer:
    observer = Observer(model, sites, steps=options.steps, seed=options.seed)
    partial = _resume_state(options, fingerprint, corpus, "observe")
    if (state := partial.load()) is not None:
        observer.load_state(state)
        progress.note(f"  goes on after {observer.batches} of {len(corpus.observed)} batches")
    title = f"observe {corpus.used.samples} texts, {corpus.used.tokens} tokens"
    with progress.stage(title, total=len(corpus.observed)) as advance:
        advance(observer.batches)
        try:
            for batch in corpus.observed[observer.batches :]:
                observer.observe(batch, temperature=options.temperature)
                partial.save_if_due(observer.state)
                advance(1)
        except KeyboardInterrupt:
            partial.save(observer.state())
            raise
    return observer


def _smooth(model: Any, site: QuantizedInput, observer: Observer, options: CalibrationOptions) -> Smoothing:
    migrations: Migrations = ()
    if site.kind in SMOOTHED:
        migrations = MIGRATIONS if options.smooth is None else (options.smooth,)
    weight = torch.cat([model.get_submodule(name).weight.detach() for name in site.projections]).cpu()
    return search_smoothing(
        observer.sampled_rows(site.name),
        weight,
        observer.channel_maxima[site.name].amax(0),
        limbs=LIMBS[site.kind],
        outlier_channels=OUTLIER_CHANNELS[site.kind],
        migrations=migrations,
    )


def _fill_histograms(
    model: Any,
    sites: tuple[QuantizedInput, ...],
    smoothings: Mapping[str, Smoothing],
    corpus: _Corpus,
    options: CalibrationOptions,
    progress: StageProgress,
) -> dict[str, list[MagnitudeHistogram]]:
    """Stream the texts once more, for a histogram of every smoothed input in the prompt and at each step."""
    histograms = {site.name: [MagnitudeHistogram() for _ in range(options.steps + 1)] for site in sites}

    def watch(site: QuantizedInput, step: int, rows: torch.Tensor) -> None:
        smoothing = smoothings[site.name]
        smoothed = rows / smoothing.scales
        smoothed[:, list(smoothing.outlier_channels)] = 0
        histograms[site.name][step].add(smoothed.cpu().numpy(), where=site.name)

    with progress.stage("fill the histograms", total=len(corpus.observed)) as advance:
        for batch in corpus.observed:
            with watched(model, sites, watch) as position:
                for _ in run_batch(model, batch, position, steps=options.steps, temperature=options.temperature):
                    pass
            advance(1)
    return histograms


def _input_calibration(smoothing: Smoothing, ranges: Sequence[float], thresholds: Sequence[float]) -> InputCalibration:
    scales = smoothing.scales
    return InputCalibration(
        smoothing.migration,
        () if bool((scales == 1).all()) else tuple(_rounded(scales.tolist())),
        smoothing.outlier_channels,
        tuple(_rounded(ranges)),
        tuple(_rounded(thresholds)),
        float(f"{smoothing.error**0.5:.4g}"),
    )


def _rounded(numbers: Sequence[float]) -> list[float]:
    """Six digits: what int8 cannot tell apart would only make the file longer."""
    return [float(f"{number:.6g}") for number in numbers]


def _resume_state(
    options: CalibrationOptions, fingerprint: ModelFingerprint, corpus: _Corpus, stage: str
) -> ResumeState:
    facts = (fingerprint, corpus.used, options.max_tokens, stage, str(torch.__version__))
    identity = msgspec.json.encode(facts).decode()
    return ResumeState(options.output.with_name(f"{options.output.name}.partial"), identity=identity)
