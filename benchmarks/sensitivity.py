"""Time of the sensitivity stage on SDXL's UNet, with random weights: per layer, and on one or several GPUs.

    python benchmarks/sensitivity.py --out sensitivity.json
    torchrun --nproc-per-node 2 benchmarks/sensitivity.py --out sensitivity.json

Both write into one file, which then says how many layers a second each number of processes does. Predicts all 794
layers from a few prompts (the cheap mode), measures some layers for real, and says what all would take. Prints the
seconds of each phase; what is done is in the file from then on. Needs torch, torchao, diffusers, accelerate and
torchmetrics; nothing else is loaded from disk.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import torch  # noqa: E402

from mixdq_ao import families  # noqa: E402
from mixdq_ao.bench.models import SDXL_CONFIG  # noqa: E402
from mixdq_ao.bits import KINDS  # noqa: E402
from mixdq_ao.files import write_text  # noqa: E402
from mixdq_ao.sensitivity import PROBES, sensitivity  # noqa: E402

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
SMALL_VAE = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 8}


class RandomPipeline:
    """SDXL-Turbo's UNet and VAE with random weights, one step; random numbers stand for encoded prompts."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int, small: bool):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(dtype)
            self.unet = UNet2DConditionModel.from_config(SDXL_CONFIG | (SMALL if small else {})).eval()
            self.vae = AutoencoderKL(**VAE | (SMALL_VAE if small else {})).eval()
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


class Report:
    """What is known so far: ``found`` of this number of processes, beside what other runs left in the file."""

    def __init__(self, out: Path | None, processes: int, rank: int):
        self.out, self.processes, self.rank = out, str(processes), rank
        self.found: dict = {"seconds": {}}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.found["seconds"][name] = round(time.perf_counter() - begin, 2)
        if self.rank == 0:
            print(f"{time.perf_counter() - START:7.1f} s  {name}: {self.found['seconds'][name]:.1f} s", flush=True)
            self.write()

    def add(self, name: str, values: dict) -> None:
        self.found[name] = values
        if self.rank == 0:
            print(json.dumps({name: values}), flush=True)
            self.write()

    def write(self) -> None:
        if self.out is None:
            return
        whole = json.loads(self.out.read_text()) if self.out.exists() else {"processes": {}}
        whole["processes"][self.processes] = self.found
        rates = {n: run["layers"]["layers_per_s"] for n, run in whole["processes"].items() if "layers" in run}
        whole["layers_per_s"] = rates
        if "1" in rates:
            whole["over_one_process"] = {n: rate / rates["1"] for n, rate in rates.items()}
        write_text(self.out, json.dumps(whole, indent=1) + "\n")


def rows_of(folder: Path) -> list[list[dict]]:
    """What each process noted, without the line of settings."""
    paths = sorted(folder.glob("rows-*.jsonl"))
    return [[row for row in map(json.loads, p.read_text().splitlines()) if "what" in row] for p in paths]


def took(folder: Path, kinds: tuple[str, ...]) -> list[list[float]]:
    """Seconds of each piece of work, by process."""
    return [[row["took"] for row in rows if row["what"] in kinds] for rows in rows_of(folder)]


def spread(names: list[str], count: int) -> list[str]:
    return names[:: max(1, len(names) // count)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=32, help="prompts of the cheap mode")
    parser.add_argument("--full-prompts", type=int, default=8, help="prompts of the full mode; 0 leaves it out")
    parser.add_argument("--full-layers", type=int, default=16, help="layers that are measured in the full mode")
    parser.add_argument("--probes", type=int, default=PROBES)
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at a time")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--small", action="store_true", help="a small UNet, to try the script")
    parser.add_argument("--work", type=Path, help="folder that all processes share, for a new one in it")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to add to")
    args = parser.parse_args()

    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    device, rank = state.device, state.process_index
    report = Report(args.out, state.num_processes, rank)
    # A folder of its own in it, for it is emptied.
    work = (args.work or Path(tempfile.gettempdir())) / f"sensitivity-{state.num_processes}"
    if rank == 0:
        print(f"{time.perf_counter() - START:7.1f} s  started {state.num_processes} on {device}", flush=True)
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()
    with report.phase("model"):
        pipe = RandomPipeline(device, torch.float32 if args.small else torch.bfloat16, args.size, args.small)
    layers, family = families.layers_of(pipe.unet), families.family_of(pipe.unet)
    groups = {group: [n for n in layers if family.is_content(n) == (group == "content")] for group in PICTURES}
    report.add(
        "setting",
        {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "layers": len(layers),
            "weights": sum(m.weight.numel() for m in layers.values()),
            **{name: getattr(args, name) for name in ("size", "probes", "batch_size", "prompts", "full_prompts")},
        },
    )

    def run(name: str, prompts: int, **options) -> None:
        with report.phase(name):
            names = [f"prompt {i}" for i in range(prompts)]
            sensitivity(pipe, None, names, work / name, progress=False, batch_size=args.batch_size, **options)
            state.wait_for_everyone()

    # A few layers first: kernels are loaded, libraries choose, and there is a first answer.
    first = [names[0] for names in groups.values()]
    run("first layers", args.full_prompts or 1, layers=first)
    report.add("first", full_rates(work / "first layers", groups))
    run("cheap", args.prompts, cheap=True, probes=args.probes)
    report.add("cheap", cheap_rates(work / "cheap", args.prompts, len(layers), report))
    if device.type == "cuda":
        report.add("memory", {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30})
    if args.full_prompts:
        some = [name for names in groups.values() for name in spread(names, args.full_layers // 2)]
        run("layers", args.full_prompts, layers=some)
        report.add("layers", full_rates(work / "layers", groups))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Whether a layer of the group is judged by pictures, which have to be drawn.
PICTURES = {"content": True, "quality": False}


def cheap_rates(folder: Path, prompts: int, layers: int, report: Report) -> dict:
    """What prompts cost, what comes once, and what a common number of prompts would take in all."""
    by_process = took(folder, ("prompts",))
    work, wall = max(map(sum, by_process)), report.found["seconds"]["cheap"]
    per_prompt, once = work / prompts, wall - work
    return {
        "ms_per_layer_and_prompt": 1e3 * sum(map(sum, by_process)) / prompts / layers,
        "prompts_per_s": prompts / work,
        "s_once": once,
        "estimated_s": {str(n): round(once + n * per_prompt, 1) for n in (32, 128, 512)},
    }


def full_rates(folder: Path, groups: dict[str, list[str]]) -> dict:
    """Seconds of a layer at all widths, for either group, and what all layers would take on so many processes."""
    by_process, rows = took(folder, tuple(KINDS)), [row for rows in rows_of(folder) for row in rows]
    measured = {row["key"] for row in rows if row["what"] in KINDS}
    found: dict = {"measured": len(measured), "layers_per_s": len(measured) / max(map(sum, by_process))}
    total = 0.0
    for group, names in groups.items():
        own = [name for name in names if name in measured]
        seconds = sum(row["took"] for row in rows if row["key"] in own)
        found[group] = {"layers": len(names), "measured": len(own), "s_per_layer": seconds / max(1, len(own))}
        total += len(names) * found[group]["s_per_layer"]
    found["estimated_min"] = total / 60 / len(by_process)
    return found


if __name__ == "__main__":
    main()
