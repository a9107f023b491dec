"""The whole method in one call: calibrate, sensitivity, allocate, choose, round, evaluate, save, report.

Everything lies in one folder, each stage's outcome in a file that is written whole, and every long stage keeps what it
has done so far: the same call, made again after it was stopped at any point, goes on from there. A call that asks for
something else of the stages after sensitivity, such as another budget, keeps what was calibrated and measured.
"""

import copy
import json
import math
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from mixdq_ao import allocate as allocation
from mixdq_ao import families
from mixdq_ao._version import __version__
from mixdq_ao.calibrate import calibrate, check_methods, checked_prompts, run_batches
from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.choose import choose
from mixdq_ao.config import MixDQConfig, quantize_
from mixdq_ao.errors import CheckpointError, MixDQError
from mixdq_ao.evaluate import FLOATING, Evaluation, Recipe, evaluate
from mixdq_ao.files import parse_json, read_text, write_text
from mixdq_ao.fingerprints import digest, fingerprints
from mixdq_ao.model_file import save
from mixdq_ao.plan import BitPlan
from mixdq_ao.program import EDGE_SLACK, Group, check_mean_bits, solve
from mixdq_ao.report import Point, write_report
from mixdq_ao.rounding import round_from_data_
from mixdq_ao.sensitivity import Sensitivity, sensitivity
from mixdq_ao.tables import Scores, Sizes

CHOSEN = "MixDQ W{bits:g}A8"
PARAMS, NAIVE_PARAMS, PLAN = "params.safetensors", "params_naive.safetensors", "plan.json"
CANDIDATES, COMPARED, SQNR_ALONE = "candidates.json", "chosen.json", "plan_sqnr_alone.json"
SETTINGS, LOCK = "settings.json", ".lock"
FIRST_SEED = "first_seed"  # the one of the seeds that plans are compared at
RATIO = "ratio"
MODEL, RESULTS, REPORT = "quantized.safetensors", "results.json", "report.html"
ROUNDED_FOUR = "uniform_4_rounded.safetensors"
# The stages after sensitivity, in order: the settings that each is the first to read, and the files that it writes.
# What they draw is not among the files: evaluate() itself measures again whatever has changed.
LATER = (
    (("budget", "candidates"), (CANDIDATES, SQNR_ALONE)),
    ((FIRST_SEED, "choose_prompts"), (COMPARED, PLAN)),
    (("rounding",), (MODEL,)),
    (("captions", "ablations", "seeds"), (RESULTS, REPORT)),
)


@dataclass(frozen=True)
class Settings:
    """What :func:`auto` is asked for; the fields that its folder remembers.

    ``budget``: mean bits of the weights. ``cheap``: predict sensitivities instead of measuring them.
    ``sensitivity_prompts``, ``choose_prompts``: how many of the calibration prompts these stages use.
    ``candidates``: how many plans are compared by pictures. ``rounding``: round weights below 8 bits by GPTQ.
    ``ablations``: measure also what each part of the method brings.
    """

    budget: float = 4.0
    seeds: tuple[int, ...] = (0, 1, 2)
    num_inference_steps: int = 1
    guidance_scale: float = 0.0
    batch_size: int = 8
    method: str = "minmax"
    weight_method: str = "mse"
    cheap: bool = True
    sensitivity_prompts: int = 8
    choose_prompts: int = 32
    candidates: int = 6
    rounding: bool = True
    ablations: bool = False
    seed: int = 0

    def check(self, unet) -> None:
        """Raises ``MixDQError`` for what a later stage would refuse, after hours maybe."""
        check_methods(self.method, self.weight_method)
        for name in ("num_inference_steps", "batch_size", "sensitivity_prompts", "choose_prompts", "candidates"):
            if getattr(self, name) < 1:
                raise MixDQError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise MixDQError(f"seeds must be different, at least one; found {list(self.seeds)}")
        if not math.isfinite(self.guidance_scale):
            raise MixDQError(f"guidance_scale must be a finite number; found {self.guidance_scale}")
        check_mean_bits(self.budget, "budget")
        floating = families.grouped_convolutions(unet)
        shapes = families.layer_shapes(unet)
        sizes = {name: math.prod(shape) for name, shape in shapes.items() if name not in floating}
        low, high = allocation.offered_means(sizes, "weight", families.family_of(unet))
        if not low - EDGE_SLACK <= self.budget <= high + EDGE_SLACK:
            # Rounded up, so that the budget that is named has a plan.
            raise MixDQError(
                f"budget must be from {math.ceil(1e4 * low) / 1e4:.4f} to {high:g} mean bits, with the widths that are "
                f"offered to the layers of this model; found {self.budget:g}"
            )


@dataclass(frozen=True)
class Auto:
    """What came out, and the folder that holds it: the model, parameters, plan, results and report."""

    folder: Path
    chosen: str
    plan: BitPlan
    evaluation: Evaluation
    findings: list[str]

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def report(self) -> Path:
        return self.folder / REPORT


def auto(
    pipe,
    prompts: Sequence[str],
    captions: Sequence[str],
    out: str | os.PathLike,
    settings: Settings | None = None,
    *,
    title: str = "A quantized UNet",
    progress: bool | None = None,
) -> Auto:
    """Quantize the UNet of a floating pipeline to a mean width, and say how good it is.

    ``prompts`` calibrate, ``captions`` evaluate; ``out`` is the folder. In that of an earlier call calibration and
    sensitivity are taken as they are, and where this call differs in what comes after them, such as the budget, the
    outcome of the stages concerned is replaced. Raises ``MixDQError`` for a folder whose calibration or sensitivity
    belongs to another call, or to nobody's, or in which another process is at work, and, before anything is written,
    for settings that a stage would refuse.
    """
    settings = settings or Settings()
    settings.check(families.denoiser_of(pipe))
    folder = Path(out)
    run = _Run(
        pipe, checked_prompts(prompts, "auto()"), checked_prompts(captions, "auto()"), folder, settings, progress
    )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        run.remember()
        params = run.params(PARAMS, bos=True)
        measured = run.sensitivity(params)
        candidates = run.candidates(measured)
        plan = run.choose(params, candidates)
        name = CHOSEN.format(bits=settings.budget)
        evaluation = run.evaluate(name, params, plan, measured)
        findings = run.findings(name, plan, evaluation)
        run.write_results(name, plan, measured, evaluation, findings)
        run.write_report(title, name, plan, measured, evaluation, findings)
    return Auto(folder, name, plan, evaluation, findings)


@dataclass(frozen=True)
class Candidate:
    """A plan, where it came from, its mean bits, and (once compared by pictures) its mean SSIM."""

    name: str
    bits: dict[str, int]
    mean_bits: float
    ssim: float | None = None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Raises ``MixDQError`` where another process is in such a block on the same folder. One that is killed is out."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise MixDQError(f"{folder}: another process is at work in this folder; wait, or give another") from None
    except (NotImplementedError, OSError) as error:
        # Some file systems have none; who works there alone needs none.
        warnings.warn(f"{folder}: other processes are not kept out, for want of a lock: {error}", stacklevel=2)
    try:
        yield
    finally:
        lock.release()


def _read_candidates(path: Path) -> list[Candidate]:
    content, keys = parse_json(path, "", read_text(path)), {field.name for field in fields(Candidate)}
    if not isinstance(content, list) or not all(isinstance(c, dict) and c.keys() == keys for c in content):
        raise CheckpointError(path, "", f"must be a list of candidates with {', '.join(sorted(keys))}")
    return [Candidate(**values) for values in content]


class _Run:
    def __init__(self, pipe, prompts: list[str], captions: list[str], folder: Path, settings: Settings, progress):
        self.pipe, self.prompts, self.captions = pipe, prompts, captions
        self.folder, self.settings, self.progress = folder, settings, progress
        self.call = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
        self.batches = {"batch_size": settings.batch_size, "progress": progress, **self.call}
        self.model = families.denoiser_of(pipe)
        self.shapes = families.layer_shapes(self.model)

    # --- files --------------------------------------------------------------------------------------------------------

    def remember(self) -> None:
        """Note what is asked for, and drop what the stages after sensitivity made of something else.

        Raises ``MixDQError`` where the folder's calibration or sensitivity is of something else, or of who knows what.
        """
        own = json.loads(json.dumps(asdict(self.settings)))
        asked = own | {
            "prompts": digest(self.prompts),
            "captions": digest(self.captions),
            FIRST_SEED: self.settings.seeds[0],
            **fingerprints(self.pipe),
        }
        path = self.folder / SETTINGS
        if path.exists():
            found = parse_json(path, "", read_text(path))
            if not isinstance(found, dict):
                raise CheckpointError(path, "", "must be a JSON object", type(found).__name__)
        else:
            self._check_nobodys()
            found = asked
        different = {key for key in {*asked, *found} if asked.get(key) != found.get(key)}
        later = {key for keys, _ in LATER for key in keys}
        if different - later:
            may = ", ".join(sorted(later - {FIRST_SEED}))
            raise MixDQError(
                f"{self.folder}: the folder was begun with other {', '.join(sorted(different - later))}. Give the same "
                f"arguments to go on, or another folder; only {may} may change in one folder"
            )
        # First what is out of date, then the note: stopped in between, neither call takes the other's for its own.
        self._forget(different)
        if different or not path.exists():
            write_text(path, json.dumps(asked, indent=1, allow_nan=False) + "\n")

    def _check_nobodys(self) -> None:
        """Settings are written first: where they are missing, files of our names are somebody else's."""
        names = (PARAMS, NAIVE_PARAMS, ROUNDED_FOUR, "sensitivity", *(file for _, files in LATER for file in files))
        if found := [name for name in names if (self.folder / name).exists()]:
            raise MixDQError(
                f"{self.folder}: there is {', '.join(found)}, but no {SETTINGS} that says what it is of, so it can "
                "neither be used nor replaced. Give another folder, or remove it"
            )

    def _forget(self, different: set[str]) -> None:
        """Remove what the first stage that reads one of these settings wrote, and the stages after it."""
        stale = False
        for keys, files in LATER:
            stale = stale or not different.isdisjoint(keys)
            for file in files if stale else ():
                (self.folder / file).unlink(missing_ok=True)

    # --- stages -------------------------------------------------------------------------------------------------------

    def params(self, file: str, bos: bool) -> QuantParams:
        path, state = self.folder / file, self.folder / f"{file}.state"
        if not path.exists():
            found = calibrate(
                self.pipe,
                self.prompts,
                method=self.settings.method,
                weight_method=self.settings.weight_method,
                seed=self.settings.seed,
                bos=bos,
                state=state,
                **self.batches,
            )
            found.save(path)
        state.unlink(missing_ok=True)
        return QuantParams.load(path)

    def sensitivity(self, params: QuantParams) -> Sensitivity:
        folder = self.folder / "sensitivity"
        if (folder / "sensitivity.json").exists():  # written last
            return Sensitivity.read(folder)
        return sensitivity(
            self.pipe,
            params,
            self.prompts[: self.settings.sensitivity_prompts],
            folder,
            kinds=("weight",),
            cheap=self.settings.cheap,
            seed=self.settings.seed,
            **self.batches,
        )

    def candidates(self, measured: Sensitivity) -> list[Candidate]:
        """Plans of the sweep over the ratio of the groups' budgets, and the joint plan where there is one."""
        path = self.folder / CANDIDATES
        if not path.exists():
            problem = self._problem(measured)
            points = allocation.sweep(problem, self.settings.budget, progress=self.progress)
            found = [
                Candidate(f"{RATIO} {p.ratio:g}", dict(p.plan), p.mean_bits) for p in points if p.ratio is not None
            ]
            found += [Candidate("one group", dict(p.plan), p.mean_bits) for p in points if p.ratio is None]
            if problem.noise is not None:
                order = {c.name: p.noise for c, p in zip(found, points, strict=True)}
                found = sorted(found, key=lambda c: order[c.name])
                joint = allocation.joint(problem, self.settings.budget)
                found.insert(0, Candidate("joint", dict(joint.plan), joint.mean_bits))
            write_text(path, json.dumps([asdict(c) for c in found[: self.settings.candidates]], indent=1) + "\n")
        return _read_candidates(path)

    def _problem(self, measured: Sensitivity) -> allocation.Problem:
        scores = measured.scores["weight"]
        family = families.family_of(self.model)
        return allocation.problem(scores.get("ssim"), scores["sqnr"], measured.sizes["weight"], family=family)

    def choose(self, params: QuantParams, candidates: list[Candidate]) -> BitPlan:
        """The candidate whose pictures of calibration prompts are nearest to the floating ones, see ``choose``."""
        path = self.folder / PLAN
        if not path.exists():
            choice = choose(
                self.pipe,
                params,
                {c.name: BitPlan(c.bits, source=c.name) for c in candidates},
                self.prompts[: self.settings.choose_prompts],
                seeds=self.settings.seeds[:1],
                out=self.folder / "choose",
                pictures=1,
                **self.batches,
            )
            marked = [replace(c, ssim=choice.evaluation.row(c.name).mean("ssim")) for c in candidates]
            write_text(self.folder / COMPARED, json.dumps([asdict(c) for c in marked], indent=1) + "\n")
            choice.plan.write(path)
        return BitPlan.read(path)

    def evaluate(self, name: str, params: QuantParams, plan: BitPlan, measured: Sensitivity) -> Evaluation:
        """Uniform W8A8 and W4A8 and the chosen plan, and what shows the part of each step where ablations are on."""
        self._save_model(self.folder / MODEL, params, plan)
        variants: dict[str, Recipe] = {"W8A8": MixDQConfig(params, 8, 8), "W4A8": MixDQConfig(params, 4, 8)}
        if self.settings.ablations:
            naive = self.params(NAIVE_PARAMS, bos=False)
            alone = self.folder / SQNR_ALONE
            if not alone.exists():
                self._sqnr_alone(measured).write(alone)
            ends = list(self.shapes)
            ends = {name: 8 if name in (ends[0], ends[-1]) else 4 for name in ends}
            variants["W8A8 without BOS"] = MixDQConfig(naive, 8, 8)
            variants["W4A8, first and last layer W8"] = MixDQConfig(params, ends, 8)
            if (groups := self._best_of_sweep()) is not None:
                variants[f"W{self.settings.budget:g}A8, two groups"] = MixDQConfig(params, groups.bits, 8)
            variants[f"W{self.settings.budget:g}A8, SQNR alone"] = MixDQConfig(params, str(alone), 8)
            if self.settings.rounding:
                rounded = self.folder / ROUNDED_FOUR
                self._save_model(rounded, params, BitPlan.uniform(plan, 4))
                variants["W4A8, rounded"] = rounded
                variants[f"{name}, nearest"] = MixDQConfig(params, dict(plan), 8)
        variants[name] = self.folder / MODEL
        return evaluate(
            self.pipe,
            variants,
            self.captions,
            seeds=self.settings.seeds,
            out=self.folder / "evaluation",
            **self.batches,
        )

    def _best_of_sweep(self) -> Candidate | None:
        """The best of the plans that have one program for each group and metric; None for a model with one group."""
        return max((c for c in self._compared() if c.name.startswith(RATIO)), key=lambda c: c.ssim, default=None)

    def _sqnr_alone(self, measured: Sensitivity) -> BitPlan:
        """One group, one metric: the plan with the highest summed SQNR, content layers at the widths they may have."""
        problem = self._problem(measured)
        sqnr = measured.scores["weight"]["sqnr"]
        scores: Scores = {
            n: {b: sqnr[n][b] for b in by_bits} for g in problem.groups for n, by_bits in g.scores.items()
        }
        sizes: Sizes = problem.sizes
        bits = solve(Group("all layers", scores, sizes), self.settings.budget)
        return BitPlan(bits, source="SQNR alone")

    def _save_model(self, path: Path, params: QuantParams, plan: BitPlan) -> None:
        if path.exists():
            return
        unet = copy.deepcopy(self.model)
        quantize_(unet, MixDQConfig(params, dict(plan), 8), progress=False)
        if self.settings.rounding:
            text = [name for name, p in params.layers.items() if p.bos_output is not None]
            round_from_data_(unet, self.model, self._run_prompts, without_bos=text, progress=self.progress)
        save(unet, path)

    def _run_prompts(self) -> None:
        for _ in run_batches(self.pipe, self.prompts, seed=self.settings.seed, text="Inputs", **self.batches):
            pass

    # --- what came out ------------------------------------------------------------------------------------------------

    def findings(self, name: str, plan: BitPlan, evaluation: Evaluation) -> list[str]:
        """Sentences that the numbers carry, better or worse."""
        found = []
        eight, four, mixed = (evaluation.row(n) for n in ("W8A8", "W4A8", name))
        floating = evaluation.row(FLOATING)
        if "accuracy" in floating.values:
            change = 100 * (eight.mean("accuracy") - floating.mean("accuracy"))
            found.append(f"W8A8 changes caption accuracy by {change:+.2f} points, at SSIM {eight.mean('ssim'):.4f}.")
        found.append(_against("The mixed plan", mixed, "uniform W4A8", four))
        if self.settings.ablations:
            found.append(
                _against(
                    "Handling the BOS token", eight, "treating it like any other", evaluation.row("W8A8 without BOS")
                )
            )
            alone = evaluation.row(f"W{self.settings.budget:g}A8, SQNR alone")
            plain = evaluation.row(f"{name}, nearest") if self.settings.rounding else mixed
            if self._best_of_sweep() is not None:
                groups = evaluation.row(f"W{self.settings.budget:g}A8, two groups")
                decoupled = "Decoupling (content layers by SSIM, the others by SQNR)"
                found.append(_against(decoupled, groups, "SQNR alone for all", alone))
            found.append(_against(f"The chosen plan ({self._source(plan)})", plain, "SQNR alone for all", alone))
            ends = evaluation.row("W4A8, first and last layer W8")
            found.append(_against("The chosen plan", plain, "uniform W4A8 with W8 at both ends", ends))
            if self.settings.rounding:
                found.append(_against("GPTQ rounding of the mixed plan", mixed, "nearest rounding", plain))
                rounded = evaluation.row("W4A8, rounded")
                found.append(_against("The mixed plan", mixed, "uniform W4A8 with the same rounding", rounded))
        return found

    def write_results(self, name, plan, measured, evaluation: Evaluation, findings) -> None:
        content = {
            "command": "mixdq-ao auto",
            "settings": parse_json(SETTINGS, "", read_text(self.folder / SETTINGS)),
            "versions": {"mixdq_ao": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "device": str(next(self.model.parameters()).device),
            "chosen": name,
            "findings": findings,
            "evaluation": evaluation.to_json(),
            "candidates": [{k: v for k, v in asdict(c).items() if k != "bits"} for c in self._compared()],
            "sensitivity": {"noise_floor": measured.noise_floor, "seconds": measured.seconds},
            "plan": dict(plan),
        }
        write_text(self.folder / RESULTS, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _compared(self) -> list[Candidate]:
        return _read_candidates(self.folder / COMPARED)

    def write_report(self, title, name, plan, measured, evaluation: Evaluation, findings) -> None:
        points = [Point(c.name, c.mean_bits, c.ssim) for c in self._compared()]
        for row in evaluation.rows[1:]:
            kind = "chosen" if row.name == name else "uniform"
            if row.name in ("W8A8", "W4A8", name):
                points.append(Point(row.name, row.weight_bits, row.mean("ssim"), kind))
        scores = measured.scores["weight"]
        panels = {"Quality layers: SQNR of the UNet output at 4 bits": ("quality", scores["sqnr"])}
        if "ssim" in scores:
            panels = {"Content layers: 1 - SSIM of pictures at 4 bits": ("content", scores["ssim"]), **panels}
        write_report(
            self.folder / REPORT,
            evaluation,
            title=title,
            chosen=name,
            plan=plan,
            shapes=self.shapes,
            sensitivity=panels,
            family=families.family_of(self.model),
            points=points,
            facts=self._facts(plan),
            findings=findings,
        )

    def _facts(self, plan: BitPlan) -> Mapping[str, str]:
        s = self.settings
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        how = "predicted from gradients" if s.cheap else "measured, one layer at a time"
        return {
            "Layers": f"{len(self.shapes)}, {sum(sizes.values()) / 1e6:.2f} million weights",
            "Plan": f"{plan.mean_bits(sizes):.3f} mean bits, from {self._source(plan)}",
            "Calibration": f"{len(self.prompts)} prompts, denoising steps: {s.num_inference_steps}; "
            f"activations by {s.method}, weights by {s.weight_method}",
            "Sensitivity": f"{how} on {min(s.sensitivity_prompts, len(self.prompts))} prompts",
            "Rounding": "GPTQ below 8 bits" if s.rounding else "nearest",
            "Evaluation": f"{len(self.captions)} captions, seeds {', '.join(map(str, s.seeds))}",
            "Versions": f"mixdq_ao {__version__}, torch {torch.__version__}",
        }

    def _source(self, plan: BitPlan) -> str:
        """Which candidate the plan is."""
        return next((c.name for c in self._compared() if c.bits == dict(plan)), "a plan that was there")


def _against(what: str, row, other_what: str, other) -> str:
    """One sentence on two rows: how much better, or that it is not."""
    gain = row.mean("ssim") - other.mean("ssim")
    sign = "beats" if gain > 0 else "does not beat"
    text = f"{what} {sign} {other_what} by SSIM: {row.mean('ssim'):.4f} against {other.mean('ssim'):.4f}"
    if "accuracy" in row.values:
        text += f", captions {100 * row.mean('accuracy'):.2f} % against {100 * other.mean('accuracy'):.2f} %"
    return text + f", SQNR {row.mean('sqnr'):.2f} dB against {other.mean('sqnr'):.2f} dB."
