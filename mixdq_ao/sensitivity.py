"""Sensitivity: what quantizing one layer, to one width, does to the UNet's output and to pictures, all else floating.

Two ways to the same tables:

- :func:`sensitivity` quantizes each layer in turn, runs the model, and compares: SQNR of the UNet output for all
  layers, SSIM of the pictures for content layers (for all, if asked).
- With ``cheap=True`` a forward and backward of some prompts predicts the SQNR of all layers at once, to first order.
  See ``probing``.

Under ``accelerate launch`` the layers, or the prompts, are spread over the processes, which share ``out``.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixdq_ao import families
from mixdq_ao.bits import FLOAT_BITS, KINDS
from mixdq_ao.calibrate import checked_prompts, generators, run_pipeline
from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.errors import CheckpointError, MixDQError, name_list
from mixdq_ao.evaluate import pictures_of, ssim_of_each
from mixdq_ao.files import parse_json, read_text, write_text
from mixdq_ao.fingerprints import arguments_digest, digest, fingerprints
from mixdq_ao.notebook import Notebook
from mixdq_ao.probing import Call, probe_call
from mixdq_ao.progress import track
from mixdq_ao.simulate import (
    simulated,
)
from mixdq_ao.tables import Scores, Sizes, read_scores, read_sizes, write_scores, write_sizes
from mixdq_ao.tensor import MixDQTensor
from mixdq_ao.watching import watching

SQNR, SSIM = "sqnr", "ssim"
METRICS = ("decoupled", "both")
MAX_DB = 200.0  # stands for "no difference", which is infinite; double rounding is far above
PROBES = 4
# Content layers whose pictures tie the cheap mode's SSIM to its SQNR.
ANCHORS = 4
REPORT = "sensitivity.json"


@dataclass(frozen=True)
class Sensitivity:
    """Tables of scores, as ``allocate`` takes them.

    - ``scores``: kind ("weight", "act") -> metric ("sqnr" in dB, "ssim") -> layer -> bits -> score, higher is safer
    - ``sizes``: kind -> layer -> weight count, or elements of the layer's input for one picture
    - ``noise_floor``: metric -> score of the floating model against itself in batches of another size; scores above it
      say nothing
    - ``seconds``: spent measuring, summed over processes, loading not counted
    - ``settings``: what was measured
    """

    scores: dict[str, dict[str, Scores]]
    sizes: dict[str, Sizes]
    noise_floor: dict[str, float]
    seconds: float
    settings: dict = field(repr=False)

    def write(self, folder) -> None:
        """``weight_sqnr.yaml``, ``act_ssim.yaml``, ``weight_sizes.yaml`` and the like, and ``sensitivity.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, metrics in self.scores.items():
            for metric, scores in metrics.items():
                write_scores(folder / f"{kind}_{metric}.yaml", scores)
            write_sizes(folder / f"{kind}_sizes.yaml", self.sizes[kind])
        tables = {kind: list(metrics) for kind, metrics in self.scores.items()}
        report = {"tables": tables, "noise_floor": self.noise_floor, "seconds": self.seconds, "settings": self.settings}
        write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")

    @classmethod
    def read(cls, folder) -> "Sensitivity":
        """What :meth:`write` wrote. Raises ``CheckpointError``."""
        folder = Path(folder)
        report = parse_json(folder / REPORT, "", read_text(folder / REPORT))
        if not isinstance(report, dict) or set(report) != {"tables", "noise_floor", "seconds", "settings"}:
            raise CheckpointError(folder / REPORT, "", "must be a report of sensitivity()")
        scores = {
            kind: {metric: read_scores(folder / f"{kind}_{metric}.yaml") for metric in metrics}
            for kind, metrics in report["tables"].items()
        }
        sizes = {kind: read_sizes(folder / f"{kind}_sizes.yaml") for kind in scores}
        return cls(scores, sizes, report["noise_floor"], report["seconds"], report["settings"])


def sensitivity(
    pipe,
    params: QuantParams | None,
    prompts: Sequence[str],
    out: str | os.PathLike,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    metrics: str = "decoupled",
    cheap: bool = False,
    probes: int = PROBES,
    layers: Iterable[str] | None = None,
    num_inference_steps: int = 1,
    guidance_scale: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
    **pipe_kwargs,
) -> Sensitivity:
    """Measure, or with ``cheap`` predict, the sensitivity of every layer at every width; writes tables into ``out``.

    Args:
        pipe: a diffusers pipeline with a floating UNet or transformer; under ``accelerate launch`` it moves to the
            process's device.
        params: scales and zero points at each width, from ``calibrate``; None = weights by their largest value,
            activations dynamic.
        out: a folder. Each layer (cheap: each batch) is noted there as soon as it is done, and the same call, made
            again after it was stopped, goes on from there.
        kinds: "weight" at 2, 4 and 8 bits with floating activations, "act" at 4 and 8 bits with floating weights.
        metrics: "decoupled": SSIM for content layers only; "both": for all. SQNR is there for all layers.
        probes: random directions for each prompt in cheap mode; prompts * probes estimates are averaged.
        batch_size: pictures at a time; in cheap mode prompts * probes, with what a backward pass keeps for each (1.5
            GiB for SDXL at 512 px). Rounding weights takes as long for many prompts as for one.
        layers: names of the layers to measure; by default all but grouped convolutions, which stay floating.

    Raises ``MixDQError`` for a quantized model, unknown names, and for an ``out`` that holds another measurement.
    """
    start = time.perf_counter()
    prompts = checked_prompts(prompts, "sensitivity()")
    if metrics not in METRICS:
        raise MixDQError(f"metrics must be one of {', '.join(METRICS)}; found {metrics!r}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise MixDQError(f"kinds must be of {', '.join(KINDS)}; found {list(kinds)}")
    kinds = [kind for kind in KINDS if kind in kinds]  # in any order they are one measurement
    processes = _Processes()
    processes.place(pipe)
    model = families.denoiser_of(pipe)
    every = families.layers_of(model)
    for name in families.grouped_convolutions(model):  # they stay floating
        del every[name]
    quantized = [name for name, m in every.items() if isinstance(m.weight, MixDQTensor)]
    if quantized:
        raise MixDQError(
            f"sensitivity is measured on a floating model; {len(quantized)} layers are quantized already, first "
            f"{quantized[0]}"
        )
    names = list(every if layers is None else layers)
    if unknown := [name for name in names if name not in every]:
        raise MixDQError(f"{len(unknown)} names are not layers of the model: {name_list(unknown)}")
    settings = {
        "mode": "cheap" if cheap else "full",
        "metrics": metrics,
        "prompts": digest(prompts),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "batch_size": batch_size,
        "seed": seed,
        "pipe_kwargs": arguments_digest(pipe_kwargs),
        **fingerprints(pipe),
        "params": _digest_of(params),
        **({"kinds": sorted(kinds), "layers": digest(names), "probes": probes} if cheap else {}),
    }
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **pipe_kwargs}
    run = _Run(pipe, params, prompts, call, batch_size, seed, metrics == "both")
    rows = Notebook(Path(out), settings, processes.rank)
    processes.wait()  # all must see the same work as done before the first adds to it
    if cheap:
        _predict(run, rows, processes, kinds, names, probes, progress)
    else:
        _measure(run, rows, processes, kinds, names, progress)
    rows.add("seconds", processes.rank, {"seconds": time.perf_counter() - start})
    processes.wait()
    found = rows.read()
    result = (_predicted if cheap else _measured)(run, found, kinds, names, settings)
    if processes.rank == 0:
        result.write(out)
    processes.wait()
    return result


def rank_correlation(a: Scores, b: Scores, bits: int | None = None) -> float:
    """Spearman's rank correlation of two score tables over the layers and widths (or one width) that both have."""
    from scipy.stats import spearmanr

    keys = [(n, w) for n in a if n in b for w in a[n] if w in b[n] and bits in (None, w)]
    return float(spearmanr([a[n][w] for n, w in keys], [b[n][w] for n, w in keys]).statistic)


# --- running the pipeline ---------------------------------------------------------------------------------------------


class _Processes:
    """This process among those of ``accelerate launch``; the only one without."""

    def __init__(self):
        from accelerate import PartialState

        # Unless told so it takes processes without an accelerator for strangers.
        self._state = PartialState(cpu=not torch.accelerator.is_available())
        self.rank, self.count = self._state.process_index, self._state.num_processes

    def place(self, pipe) -> None:
        if self.count > 1 and self._state.device.type != "cpu":
            pipe.to(self._state.device)

    def share(self, items: Sequence) -> Sequence:
        """Every ``count``-th item: neighbours, which cost about the same, go to different processes."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        self._state.wait_for_everyone()


class _Run:
    """The pipeline with its prompts, and what the floating model does with them."""

    def __init__(self, pipe, params, prompts, call: dict, batch_size: int, seed: int, all_pictures: bool):
        self.pipe, self.params, self.prompts, self.call = pipe, params, prompts, call
        self.batch_size, self.seed, self.all_pictures = batch_size, seed, all_pictures
        self.model = families.denoiser_of(pipe)
        self.family = families.family_of(self.model)
        self.layers = families.layers_of(self.model)
        pipe.set_progress_bar_config(disable=True)
        self._numbers: Sequence[int] = ()
        self.calls: list[Call] = []
        self.pictures: Tensor | None = None

    def draw(self, numbers: Sequence[int], batch_size: int, pictures: bool = True) -> tuple[Tensor | None, list[Call]]:
        """Pictures ``[n, 3, h, w]`` in 0..1 (None where they are not wanted) and the UNet calls behind them."""
        calls, parts = [], []

        def keep(module, args, kwargs, output):
            first = output[0] if isinstance(output, tuple) else output.sample
            calls.append(Call(args, kwargs, first.detach()))

        hook = self.model.register_forward_hook(keep, with_kwargs=True)
        try:
            for start in range(0, len(numbers), batch_size):
                part = numbers[start : start + batch_size]
                result = run_pipeline(
                    self.pipe,
                    prompt=[self.prompts[i] for i in part],
                    generator=generators(self.seed, part),
                    output_type="pt" if pictures else "latent",
                    **self.call,
                )
                images = pictures_of(self.pipe, result)
                if isinstance(images, np.ndarray):  # of pipelines that do not know "pt"
                    images = torch.from_numpy(images).permute(0, 3, 1, 2)
                parts.append(images)
        finally:
            hook.remove()
        return (torch.cat(parts) if pictures else None), calls

    def make_reference(self, pictures: bool, count: int | None = None) -> None:
        """What the floating model makes of the first ``count`` prompts, of all by default."""
        self._numbers = range(len(self.prompts))[:count]
        self.pictures, self.calls = self.draw(self._numbers, self.batch_size, pictures)
        if not all(bool(call.output.isfinite().all()) for call in self.calls):
            raise MixDQError("the floating UNet's output is not finite; run it in float32 or bfloat16")

    @torch.no_grad()
    def replay(self, call: Call, change=lambda t: t) -> Tensor:
        args, kwargs = call.on_batch(change)
        return self.model(*args, **{**kwargs, "return_dict": False})[0]

    def wants_pictures(self, name: str) -> bool:
        return self.all_pictures or self.family.is_content(name)

    def scores(self, pictures: bool) -> dict[str, float]:
        """SQNR, and SSIM if wanted, of the pipeline's present UNet against the reference."""
        outputs = None
        scores = {}
        if pictures:
            drawn, calls = self.draw(self._numbers, self.batch_size)
            scores[SSIM] = self._ssim(drawn)
            # With one step the inputs were those of the floating model, and nothing is left to run.
            if self.call["num_inference_steps"] == 1:
                outputs = [call.output for call in calls]
        if outputs is None:
            outputs = [self.replay(call) for call in self.calls]
        pairs = zip(self.calls, outputs, strict=True)
        return {SQNR: _decibels(*_energies([(call.output, output) for call, output in pairs])), **scores}

    def _ssim(self, pictures: Tensor) -> float:
        # In float32 its own rounding, 1e-5, would hide what most layers do at 8 bits.
        return float(ssim_of_each(pictures.double().nan_to_num(0.0), self.pictures.double()).mean())

    def noise_floor(self) -> dict[str, float]:
        """Scores of the floating model against itself, in batches of half the size."""
        pairs = []
        for call in self.calls:
            half = max(1, call.batch // 2)
            slices = [slice(i, i + half) for i in range(0, call.batch, half)]
            pairs.append((call.output, torch.cat([self.replay(call, itemgetter(part)) for part in slices])))
        floor = {SQNR: _decibels(*_energies(pairs))}
        if self.pictures is not None:
            drawn, _ = self.draw(self._numbers, max(1, self.batch_size // 2))
            floor[SSIM] = self._ssim(drawn)
        return floor

    def input_sizes(self) -> Sizes:
        """Elements of each layer's input for one picture, over all calls for it."""
        sizes: Sizes = {}
        pictures = len(self.prompts)

        def note(name: str, x: Tensor) -> None:
            sizes[name] = sizes.get(name, 0.0) + x.numel() / min(self.batch_size, pictures)

        numbers = range(min(self.batch_size, pictures))
        with watching(self.model, {name: partial(note, name) for name in self.layers}):
            self.draw(numbers, self.batch_size, pictures=False)
        return sizes


def _energies(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Energy of the references, and of the differences, in float64."""
    signal = noise = 0.0
    for reference, value in pairs:
        reference = reference.double()
        signal += float(reference.square().sum())
        noise += float((value.double() - reference).square().sum())
    return signal, noise


def _decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, at most ``MAX_DB``; a noise that is not finite is as bad as can be."""
    if not math.isfinite(noise):
        return -MAX_DB
    return MAX_DB if noise <= 0 else max(-MAX_DB, min(MAX_DB, 10 * math.log10(signal / noise)))


def _digest_of(params: QuantParams | None) -> str | None:
    if params is None:
        return None
    total = hashlib.blake2b(digest_size=16)
    for name, layer in sorted(params.layers.items()):
        for key, _, tensor in layer.tensors():
            total.update(f"{name}.{key}:".encode())
            total.update(tensor.detach().double().cpu().numpy().tobytes())
    return total.hexdigest()


# --- the full measurement ---------------------------------------------------------------------------------------------


def _pair(kind: str, bits: int) -> tuple[int, int]:
    """Bits of weight and activations where only ``kind`` is quantized."""
    return (bits, FLOAT_BITS) if kind == "weight" else (FLOAT_BITS, bits)


def _measure(run: _Run, rows: Notebook, processes: _Processes, kinds, names, progress) -> None:
    todo = [(kind, name) for kind in kinds for name in names]
    mine = [(kind, name) for kind, name in todo if (kind, name) not in rows.done]
    mine = processes.share(mine)
    floor = _floor(run, names)
    if mine or floor not in rows.done:
        run.make_reference(any(run.wants_pictures(name) for name in names))
    if processes.rank == 0:
        _note_model(run, rows, floor)
    text = "Sensitivity" if processes.count == 1 else f"Sensitivity, process 1 of {processes.count}"
    for kind, name in track(mine, text, len(mine), progress if processes.rank == 0 else False):
        start, values = time.perf_counter(), {}
        for bits in KINDS[kind]:
            with simulated(run.model, run.params, {name: _pair(kind, bits)}):
                for metric, score in run.scores(run.wants_pictures(name)).items():
                    values.setdefault(metric, {})[bits] = score
        rows.add(kind, name, {**values, "took": time.perf_counter() - start})


def _floor(run: _Run, names) -> tuple[str, str]:
    """The line of the noise floor: that of layers without pictures lacks theirs."""
    return "floor", SSIM if any(run.wants_pictures(name) for name in names) else SQNR


def _note_model(run: _Run, rows: Notebook, floor: tuple[str, str]) -> None:
    if floor not in rows.done:
        rows.add(*floor, {"floor": run.noise_floor(), "input_sizes": run.input_sizes()})


def _measured(run: _Run, rows: dict, kinds, names, settings) -> Sensitivity:
    scores = {}
    for kind in kinds:
        scores[kind] = {}
        for name in names:
            for metric in (SQNR, SSIM):
                values = rows[kind, name].get(metric)
                if values is not None:
                    by_bits = {int(bits): score for bits, score in values.items()}
                    scores[kind].setdefault(metric, {})[name] = by_bits
    return _result(run, rows, scores, names, settings)


def _result(run: _Run, rows: dict, scores, names, settings) -> Sensitivity:
    model = rows[_floor(run, names)]
    seen = model["input_sizes"]
    if unseen := [name for name in names if name not in seen]:
        raise MixDQError(f"{len(unseen)} layers were never run: {name_list(unseen)}")
    sizes = {"weight": {n: float(run.layers[n].weight.numel()) for n in names}, "act": {n: seen[n] for n in names}}
    seconds = sum(row["seconds"] for (what, _), row in rows.items() if what == "seconds")
    return Sensitivity(scores, {kind: sizes[kind] for kind in scores}, model["floor"], seconds, settings)


# --- the prediction ---------------------------------------------------------------------------------------------------


def _predict(run: _Run, rows: Notebook, processes: _Processes, kinds, names, probes: int, progress) -> None:
    every, at_once = range(len(run.prompts)), max(1, run.batch_size // probes)
    batches = [every[first : first + at_once] for first in every[::at_once] if ("prompts", first) not in rows.done]
    mine = processes.share(batches)
    for numbers in track(mine, "Sensitivity", len(mine), progress if processes.rank == 0 else False):
        start = time.perf_counter()
        _, calls = run.draw(numbers, len(numbers), pictures=False)
        found = []
        for i, call in enumerate(calls):
            seeds = [number * len(calls) + i for number in numbers]
            found.append(probe_call(run.model, run.params, call, kinds, names, probes, generators(run.seed + 1, seeds)))
        noise = {
            kind: {name: [sum(v) for v in zip(*(f["noise"][kind][name] for f in found), strict=True)] for name in names}
            for kind in kinds
        }
        signal, seconds = sum(f["signal"] for f in found), time.perf_counter() - start
        rows.add("prompts", numbers[0], {"signal": signal, "noise": noise, "took": seconds})
    processes.wait()
    floor = _floor(run, names)
    if processes.rank == 0 and not {floor, ("anchors", "")} <= rows.done:
        content = [name for name in names if run.wants_pictures(name)]
        run.make_reference(bool(content), run.batch_size)
        _note_model(run, rows, floor)
        if ("anchors", "") not in rows.done:
            rows.add("anchors", "", {"factor": _anchor(run, _predicted_noise(rows.read(), kinds, names), content)})


def _predicted_noise(rows: dict, kinds, names) -> dict[str, dict[str, dict[int, float]]]:
    """Relative error energy of the UNet output: kind -> layer -> bits."""
    found = [row for (what, _), row in rows.items() if what == "prompts"]
    signal = sum(row["signal"] for row in found)
    return {
        kind: {
            name: {
                bits: sum(row["noise"][kind][name][i] for row in found) / signal for i, bits in enumerate(KINDS[kind])
            }
            for name in names
        }
        for kind in kinds
    }


def _anchor(run: _Run, noise, content: list[str]) -> float | None:
    """How much larger the relative error energy of pictures, ``2 (1/SSIM - 1)``, is than that of the UNet output.

    The median over a few content layers, spread over the upper half of predictions, where errors show, each quantized
    for real to its lowest width; None without content layers, and where not one changes a picture.
    """
    if not content:
        return None
    kind = next(iter(noise))
    bits = KINDS[kind][0]
    order = sorted(content, key=lambda name: noise[kind][name][bits])[len(content) // 2 :]
    factors = []
    for i in range(ANCHORS):
        name = order[(2 * i + 1) * len(order) // (2 * ANCHORS)]
        with simulated(run.model, run.params, {name: _pair(kind, bits)}):
            scores = run.scores(pictures=True)
        if scores[SSIM] < 1:
            factors.append(2 * (1 / max(scores[SSIM], 1e-3) - 1) * 10 ** (scores[SQNR] / 10))
    return sorted(factors)[len(factors) // 2] if factors else None


def _predicted(run: _Run, rows: dict, kinds, names, settings) -> Sensitivity:
    noise = _predicted_noise(rows, kinds, names)
    factor = rows["anchors", ""]["factor"]
    scores = {}
    for kind in kinds:
        tables = {SQNR: {n: {b: _decibels(1.0, e) for b, e in by_bits.items()} for n, by_bits in noise[kind].items()}}
        if factor is not None:
            content = [name for name in names if run.wants_pictures(name)]
            tables[SSIM] = {n: {b: 1 / (1 + factor * e / 2) for b, e in noise[kind][n].items()} for n in content}
        scores[kind] = tables
    return _result(run, rows, scores, names, settings)
