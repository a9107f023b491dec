"""Time of the sensitivity stage on SDXL's UNet, with random weights: per layer, and on one or several GPUs.

    python benchmarks/sensitivity.py
    torchrun --nproc-per-node 4 benchmarks/sensitivity.py

Predicts all 794 layers from a few prompts (the cheap mode) and times that, then measures some layers for real and says
what all would take. Two minutes on an H200. Needs torch, torchao, diffusers, accelerate and torchmetrics; nothing is
loaded from disk. Prints JSON, and writes it to --out.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from mixdq_ao import families
from mixdq_ao.bench.models import SDXL_CONFIG
from mixdq_ao.files import write_text
from mixdq_ao.sensitivity import PROBES, sensitivity

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
# To try the script on a machine without a GPU.
SMALL = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "norm_num_groups": 16,
}


class RandomPipeline:
    """SDXL-Turbo's UNet and VAE with random weights, one step; random numbers stand for encoded prompts."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int, small: bool):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(dtype)
            self.unet = UNet2DConditionModel.from_config(SDXL_CONFIG | (SMALL if small else {})).eval()
            self.vae = AutoencoderKL(**VAE).eval()
            torch.set_default_dtype(torch.float32)
        self.size, self.device, self.dtype = size // 8, device, dtype

    def set_progress_bar_config(self, **kwargs):
        pass

    def to(self, device):
        self.device = torch.device(device)
        self.unet.to(device)
        self.vae.to(device)

    def __call__(self, prompt, generator, output_type, num_inference_steps, guidance_scale):
        n = len(prompt)

        def noise(*shape: int) -> torch.Tensor:
            values = torch.stack([torch.randn(shape, generator=g) for g in generator])
            return values.to(self.device, self.dtype)

        texts, pooled, latents = noise(77, 2048), noise(1280), noise(4, self.size, self.size)
        ids = torch.full((n, 6), 8.0 * self.size, device=self.device, dtype=self.dtype)
        added = {"text_embeds": pooled, "time_ids": ids}
        timestep = torch.tensor(999.0, device=self.device)
        latents = latents - self.unet(latents, timestep, texts, added_cond_kwargs=added, return_dict=False)[0]
        if output_type == "latent":
            return SimpleNamespace(images=latents)
        pictures = self.vae.decode(latents / VAE["scaling_factor"], return_dict=False)[0]
        return SimpleNamespace(images=(pictures / 2 + 0.5).clamp(0, 1))


def rows_of(folder: Path) -> list[dict]:
    lines = [line for path in folder.glob("rows-*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=32, help="prompts of the cheap mode")
    parser.add_argument("--full-prompts", type=int, default=8, help="prompts of the full mode; 0 leaves it out")
    parser.add_argument("--full-layers", type=int, default=16, help="layers that are measured in the full mode")
    parser.add_argument("--probes", type=int, default=PROBES)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--small", action="store_true", help="a small UNet, to try the script")
    parser.add_argument("--work", type=Path, help="folder that all processes share; a new one by default")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    device, rank = state.device, state.process_index
    work = args.work or Path(tempfile.gettempdir()) / f"sensitivity-{state.num_processes}"
    if rank == 0:
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()
    pipe = RandomPipeline(device, torch.float32 if args.small else torch.bfloat16, args.size, args.small)
    layers = list(families.layers_of(pipe.unet))
    report = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": state.num_processes,
        "layers": len(layers),
        "weights": sum(m.weight.numel() for m in families.layers_of(pipe.unet).values()),
        "size": args.size,
        "probes": args.probes,
    }

    def timed(folder: str, prompts: int, **options):
        state.wait_for_everyone()
        start = time.perf_counter()
        names = [f"prompt {i}" for i in range(prompts)]
        found = sensitivity(pipe, None, names, work / folder, progress=False, **options)
        return found, time.perf_counter() - start

    timed("warm", state.num_processes, cheap=True, probes=args.probes)
    cheap, wall = timed("cheap", args.prompts, cheap=True, probes=args.probes)
    took = [row["took"] for row in rows_of(work / "cheap") if row.get("what") == "prompt"]
    report["cheap"] = {
        "prompts": args.prompts,
        "wall_s": wall,
        "s_per_prompt": statistics.median(took),
        "ms_per_layer_and_prompt": 1e3 * statistics.median(took) / len(layers),
        "passes_wall_s": sum(took) / state.num_processes,
        "noise_floor": cheap.noise_floor,
    }
    if device.type == "cuda":
        report["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if args.full_prompts:
        report["full"] = measure_some(timed, pipe.unet, layers, args)
    if rank == 0:
        text = json.dumps(report, indent=1)
        print(text, flush=True)
        if args.out:
            write_text(args.out, text + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure_some(timed, unet: nn.Module, layers: list[str], args) -> dict:
    """Seconds for each layer of either group, and what all layers would take."""
    family = families.family_of(unet)
    report, total = {"prompts": args.full_prompts}, 0.0
    for group in ("content", "quality"):
        every = [name for name in layers if family.is_content(name) == (group == "content")]
        some = every[:: max(1, len(every) // (args.full_layers // 2))]
        # What is done once, the reference and the noise floor, shows with one layer.
        _, once = timed(f"{group}-one", args.full_prompts, layers=some[:1])
        _, wall = timed(f"{group}-some", args.full_prompts, layers=some)
        seconds = max(0.0, wall - once) / max(1, len(some) - 1)
        report[group] = {"layers": len(every), "measured": len(some), "s_per_layer": seconds, "s_once": once}
        total += seconds * len(every)
    report["estimate_min"] = total / 60
    return report


if __name__ == "__main__":
    main()
