"""What may be missing: packages of the method, and metrics with networks of their own (LPIPS, FID, CLIP score and
ImageReward).

Nothing is downloaded: each is there once its packages are installed and its network lies where the package looks for
it, and the error says which of them is missing.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixdq_ao.errors import MixDQError

CLIP_MODEL = "openai/clip-vit-base-patch16"
_BATCH = 32

# Reference and measured pictures, float32 [n, 3, h, w] in 0..1, and captions, to a number.
Scorer = Callable[[Tensor, Tensor, Sequence[str]], float]


@dataclass(frozen=True)
class Extra:
    """``packages`` to import; ``network``: where its file or folder should be, and whether it is; ``make`` a scorer."""

    packages: tuple[str, ...]
    network: Callable[[], tuple[str, bool]]
    make: Callable[[], Scorer]


def needed(package: str, what: str):
    """The module ``package``. Raises ``MixDQError`` where it is not installed; ``what`` needs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MixDQError(f"{what} needs {package}: pip install 'mixdq_ao[method]'") from None


def scorers(names: Sequence[str]) -> dict[str, Scorer]:
    """A scorer for each name. Raises ``MixDQError`` for an unknown name, and for what is not on this machine."""
    found = {}
    for name in names:
        if name not in EXTRAS:
            raise MixDQError(f"extra metrics are {', '.join(EXTRAS)}; found {name!r}")
        extra = EXTRAS[name]
        missing = [package for package in extra.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise MixDQError(f"{name} needs the packages {', '.join(missing)}: pip install 'mixdq_ao[metrics]'")
        where, there = extra.network()
        if not there:
            raise MixDQError(f"{name} needs its network on this machine, and nothing is downloaded: put it at {where}")
        found[name] = extra.make()
    return found


def _in_hub(filename: str) -> Callable[[], tuple[str, bool]]:
    def where() -> tuple[str, bool]:
        path = Path(torch.hub.get_dir()) / "checkpoints" / filename
        return str(path), path.is_file()

    return where


def _clip_folder() -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(CLIP_MODEL, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _image_reward_file() -> Path:
    return Path.home() / ".cache" / "ImageReward" / "ImageReward.pt"


def _lpips() -> Scorer:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def score(reference, pictures, captions):
        metric.reset()
        for r, p in zip(reference.split(_BATCH), pictures.split(_BATCH), strict=True):
            metric.update(p, r)
        return float(metric.compute())

    return score


def _fid() -> Scorer:
    """Between the floating and the quantized pictures: how far quantization moved the distribution."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(normalize=True)

    def score(reference, pictures, captions):
        metric.reset()
        for batch, real in ((reference, True), (pictures, False)):
            for part in batch.split(_BATCH):
                metric.update(part, real=real)
        return float(metric.compute())

    return score


def _clip_score() -> Scorer:
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(_clip_folder())

    def score(reference, pictures, captions):
        metric.reset()
        for start in range(0, len(pictures), _BATCH):
            part = (255 * pictures[start : start + _BATCH]).round().to(torch.uint8)
            metric.update(part, list(captions[start : start + _BATCH]))
        return float(metric.compute())

    return score


def _image_reward() -> Scorer:
    import ImageReward
    from PIL import Image

    model = ImageReward.load(str(_image_reward_file()))

    def score(reference, pictures, captions):
        arrays = (255 * pictures).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        values = [model.score(c, Image.fromarray(a)) for c, a in zip(captions, arrays, strict=True)]
        return sum(values) / len(values)

    return score


EXTRAS = {
    "lpips": Extra(("torchvision",), _in_hub("alexnet-owt-7be5be79.pth"), _lpips),
    "fid": Extra(("torch_fidelity",), _in_hub("weights-inception-2015-12-05-6726825d.pth"), _fid),
    "clip_score": Extra(
        ("transformers",), lambda: (f"the cache of {CLIP_MODEL}", _clip_folder() is not None), _clip_score
    ),
    "image_reward": Extra(
        ("ImageReward",), lambda: (str(_image_reward_file()), _image_reward_file().is_file()), _image_reward
    ),
}
