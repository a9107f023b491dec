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
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mixdq_ao import families
from mixdq_ao.bits import FLOAT_BITS, KINDS
from mixdq_ao.calibrate import checked_prompts, generators
from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.errors import CheckpointError, MixDQError, name_list
from mixdq_ao.files import parse_json, read_text, write_text
from mixdq_ao.fingerprints import arguments_digest, digest, fingerprints
from mixdq_ao.measuring import SQNR, SSIM, Processes, Run, decibels
from mixdq_ao.notebook import Notebook
from mixdq_ao.probing import probe_call
from mixdq_ao.progress import track
from mixdq_ao.simulate import simulated
from mixdq_ao.tables import Scores, Sizes, read_scores, read_sizes, write_scores, write_sizes
from mixdq_ao.tensor import MixDQTensor

METRICS = ("decoupled", "both")
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
    processes = Processes()
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
    run = Run(pipe, params, prompts, call, batch_size, seed, metrics == "both")
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


def _measure(run: Run, rows: Notebook, processes: Processes, kinds, names, progress) -> None:
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


def _floor(run: Run, names) -> tuple[str, str]:
    """The line of the noise floor: that of layers without pictures lacks theirs."""
    return "floor", SSIM if any(run.wants_pictures(name) for name in names) else SQNR


def _note_model(run: Run, rows: Notebook, floor: tuple[str, str]) -> None:
    if floor not in rows.done:
        rows.add(*floor, {"floor": run.noise_floor(), "input_sizes": run.input_sizes()})


def _measured(run: Run, rows: dict, kinds, names, settings) -> Sensitivity:
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


def _result(run: Run, rows: dict, scores, names, settings) -> Sensitivity:
    model = rows[_floor(run, names)]
    seen = model["input_sizes"]
    if unseen := [name for name in names if name not in seen]:
        raise MixDQError(f"{len(unseen)} layers were never run: {name_list(unseen)}")
    sizes = {"weight": {n: float(run.layers[n].weight.numel()) for n in names}, "act": {n: seen[n] for n in names}}
    seconds = sum(row["seconds"] for (what, _), row in rows.items() if what == "seconds")
    return Sensitivity(scores, {kind: sizes[kind] for kind in scores}, model["floor"], seconds, settings)


# --- the prediction ---------------------------------------------------------------------------------------------------


def _predict(run: Run, rows: Notebook, processes: Processes, kinds, names, probes: int, progress) -> None:
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


def _anchor(run: Run, noise, content: list[str]) -> float | None:
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


def _predicted(run: Run, rows: dict, kinds, names, settings) -> Sensitivity:
    noise = _predicted_noise(rows, kinds, names)
    factor = rows["anchors", ""]["factor"]
    scores = {}
    for kind in kinds:
        tables = {SQNR: {n: {b: decibels(1.0, e) for b, e in by_bits.items()} for n, by_bits in noise[kind].items()}}
        if factor is not None:
            content = [name for name in names if run.wants_pictures(name)]
            tables[SSIM] = {n: {b: 1 / (1 + factor * e / 2) for b, e in noise[kind][n].items()} for n in content}
        scores[kind] = tables
    return _result(run, rows, scores, names, settings)
