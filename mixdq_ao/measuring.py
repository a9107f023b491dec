"""The runs that :mod:`mixdq_ao.sensitivity` compares: a pipeline on its prompts, by one process or several."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from mixdq_ao import families
from mixdq_ao.calibrate import generators, run_pipeline
from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import pictures_of, ssim_of_each
from mixdq_ao.probing import Call
from mixdq_ao.tables import Sizes
from mixdq_ao.watching import watching

SQNR, SSIM = "sqnr", "ssim"
MAX_DB = 200.0  # stands for "no difference", which is infinite; double rounding is far above


class Processes:
    """This process among those of ``accelerate launch``; the only one without."""

    def __init__(self):
        from accelerate import PartialState

        # Unless told so it takes processes without an accelerator for strangers.
        self._state = PartialState(cpu=not torch.accelerator.is_available())
        self.rank, self.count = self._state.process_index, self._state.num_processes

    def place(self, pipe) -> None:
        """Move ``pipe`` to this process's device."""
        if self.count > 1 and self._state.device.type != "cpu":
            pipe.to(self._state.device)

    def share(self, items: Sequence) -> Sequence:
        """Every ``count``-th item: neighbours, which cost about the same, go to different processes."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()


class Run:
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
        """The output of the pipeline's present UNet for the inputs of ``call``, or a ``change`` of them."""
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
        return {SQNR: decibels(*_energies([(call.output, output) for call, output in pairs])), **scores}

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
        floor = {SQNR: decibels(*_energies(pairs))}
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


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, at most ``MAX_DB``; a noise that is not finite is as bad as can be."""
    if not math.isfinite(noise):
        return -MAX_DB
    return MAX_DB if noise <= 0 else max(-MAX_DB, min(MAX_DB, 10 * math.log10(signal / noise)))
