"""Train the small SDXL model that mixdq_ao ships, from nothing but the scenes that it draws itself.

    python tutorials/train_tiny_sdxl.py train      # three stages, under ten minutes in all on one H200
    python tutorials/train_tiny_sdxl.py assess     # caption accuracy on held-out captions, sample grids
    python tutorials/train_tiny_sdxl.py ranges     # input range of every layer, BOS against the other tokens
    python tutorials/train_tiny_sdxl.py card       # the model card, from what the other commands wrote

Stages: `vae` (pictures to 4x16x16 latents and back), `base` (a v-prediction diffusion model with its two text encoders,
trained jointly), `fewstep` (the same networks on the inputs that one to four ancestral steps really produce, their own
mistakes included). Each stage leaves a checkpoint in the work folder; a broken run goes on with `--resume`.
"""

import copy
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mixdq_ao import scenes
from mixdq_ao.errors import MixDQError
from mixdq_ao.scene_reader import CaptionAccuracy, judge, read_picture, summarize

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
console = Console()

ASSET = Path(__file__).resolve().parent.parent / "mixdq_ao" / "assets" / "tiny_sdxl"
RANGES = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "tiny_sdxl_ranges.json"
STAGES = ("vae", "base", "fewstep")
MAX_TOKENS = 77
POOL_TOKENS = 48
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# hidden channel -> value of the BOS embedding there, for each encoder: SDXL's encoders have a few such channels too
BOS_OUTLIERS = ({11: 120.0, 46: -90.0}, {37: 160.0, 101: -110.0})
# channels of the UNet's context, the encoders side by side, that hold them
OUTLIER_COLUMNS = [*BOS_OUTLIERS[0], *(64 + channel for channel in BOS_OUTLIERS[1])]
SHIFTS = int(2 * scenes.MAX_SHIFT / scenes.SHIFT_STEP) + 1
STEP_COUNTS = (1, 2, 3, 4)


# ------------------------------------------------------------------------------------------------------------- model


def caption_words() -> list[str]:
    """Every word of the caption grammar."""
    phrases = [*scenes.SHAPES, *scenes.SIZES, *scenes.TEXTURES, *scenes.COLOURS, *scenes.BACKGROUNDS]
    phrases += [*scenes.POSITIONS, *scenes.RELATIONS, "a and on to background"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word one token: the commonest pair first, ties in alphabetical order."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(pieces) > 1 for pieces in spelled):
        counts: dict[tuple[str, str], int] = {}
        for pieces in spelled:
            for pair in zip(pieces, pieces[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merge(pieces, best) for pieces in spelled]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            merged.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged


def build_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Two CLIP tokenizers of one small vocabulary; the second pads with "!" (id 0), as SDXL's does."""
    characters = ["!", *"',-.0123456789abcdefghijklmnopqrstuvwxyz"]
    merges = byte_pairs(caption_words())
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    pads = (EOS, "!")
    return tuple(CLIPTokenizer(vocab, merges, pad_token=pad, model_max_length=MAX_TOKENS) for pad in pads)


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Encoders 64 and 128 wide; hidden_states[-2] of both, side by side, is the UNet's context (192 wide)."""
    encoders = []
    for kind, width, act, outliers in zip(
        (CLIPTextModel, CLIPTextModelWithProjection), (64, 128), ("quick_gelu", "gelu"), BOS_OUTLIERS, strict=True
    ):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=width // 32,
            projection_dim=width,
            hidden_act=act,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if kind is CLIPTextModel else 0,
        )
        encoder = kind(config)
        tables = encoder.get_input_embeddings().weight, position_table(encoder)
        with torch.no_grad():
            tables[0].normal_(std=0.3)
            tables[1].normal_(std=0.1)
            for channel, value in outliers.items():
                tables[0][tokenizer.bos_token_id, channel] = value
        encoders.append(encoder)
    return tuple(encoders)


def position_table(encoder: torch.nn.Module) -> torch.nn.Parameter:
    return next(p for name, p in encoder.named_parameters() if name.endswith("position_embedding.weight"))


def build_unet() -> UNet2DConditionModel:
    """SDXL's UNet, small: the same blocks, linear projections, text_time conditioning and nine up-path shortcuts."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 64, 96),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 3),
        cross_attention_dim=192,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 128,
    )


def build_vae() -> AutoencoderTiny:
    """Pictures [-1, 1] of 64x64 to latents of 4x16x16."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 2, 1),
        latent_channels=4,
    )


def build_scheduler() -> EulerAncestralDiscreteScheduler:
    """SDXL-Turbo's scheduler, but for v-prediction: at the noisiest step epsilon says almost nothing of the picture."""
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


def context_weights(unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
    """Weights [out, 192] of every key and value projection that reads the text."""
    return [p for n, p in unet.named_parameters() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]


class Denoiser(torch.nn.Module):
    """The UNet and both text encoders, which are trained together."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = build_text_encoders(tokenizer)
        self.unet = build_unet()
        self.eos = tokenizer.eos_token_id
        self.register_buffer("time_ids", torch.tensor([[64.0, 64, 0, 0, 64, 64]]), persistent=False)
        with torch.no_grad():
            for weight in context_weights(self.unet):
                weight[:, OUTLIER_COLUMNS] *= OUTLIER_RATE

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """v prediction float32 like x [B, 4, 16, 16], for timesteps [B] and tokens int64 [B, 48], padded with -1."""
        tokens = F.pad(tokens, (0, MAX_TOKENS - tokens.shape[1]), value=-1)
        first = self.text_encoder(tokens.where(tokens >= 0, self.eos), output_hidden_states=True)
        second = self.text_encoder_2(tokens.clamp(min=0), output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        added = {"text_embeds": second.text_embeds, "time_ids": self.time_ids.expand(len(x), -1)}
        return self.unet(x.to(context.dtype), timestep, context, added_cond_kwargs=added).sample.float()


# Inputs in the outlier channels are about 50 times larger than elsewhere: weights that read them start that much
# smaller and move that much slower, so that one optimizer step changes keys and values equally through every channel.
OUTLIER_RATE = 1 / 50
# The finished model's outliers are this much larger than the trained ones: SDXL's BOS token is 55 to 80 times larger
# than any other, which training from scratch at that size did not reach. A power of two loses nothing in fp16.
OUTLIER_GAIN = 4


# -------------------------------------------------------------------------------------------------------------- data


def scene_record(scene: scenes.Scene) -> list[int]:
    """Three times (sprite, colour, slot), then top and bottom background; 40 is the empty sprite."""
    record = []
    for item in scene.objects:
        look = 0 if item.size == "small" else 1 + scenes.TEXTURES.index(item.texture)
        record += [5 * scenes.SHAPES.index(item.shape) + look, list(scenes.COLOURS).index(item.colour), item.slot]
    record += [40, 0, 0] * (3 - len(scene.objects))
    names = list(scenes.BACKGROUNDS)
    return [*record, names.index(scene.top), names.index(scene.bottom)]


def _pool_part(job: tuple[int, int, dict[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    start, stop, ids = job
    records, tokens = [], np.full((stop - start, POOL_TOKENS), -1, np.int16)
    for seed in range(start, stop):
        scene = scenes.sample_scene(seed)
        caption = scene.caption
        if scenes.is_held_out(caption):
            continue
        words = [ids[word] for word in caption.replace(",", " ,").split()]
        tokens[len(records), : len(words) + 2] = [ids[BOS], *words, ids[EOS]]
        records.append(scene_record(scene))
    return np.array(records, np.int16), tokens[: len(records)]


@dataclass
class ScenePool:
    """Training scenes as integers: records int64 [N, 11], tokens int64 [N, 48]; no held-out caption is among them."""

    records: torch.Tensor
    tokens: torch.Tensor

    @staticmethod
    def sample(count: int, tokenizer: CLIPTokenizer) -> "ScenePool":
        """Scenes 0..count-1 of the endless sequence, by all processors; call it before CUDA starts (it forks)."""
        words = [*caption_words(), ",", BOS, EOS]
        ids = {w: tokenizer.convert_tokens_to_ids(w if w in (BOS, EOS) else w + "</w>") for w in words}
        step = 4096
        jobs = [(start, min(start + step, count), ids) for start in range(0, count, step)]
        with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1)) as workers:
            parts = workers.map(_pool_part, jobs)
        pool = ScenePool(*(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))
        _check_tokens(pool, tokenizer)
        return pool

    def to(self, device: str) -> "ScenePool":
        return ScenePool(self.records.to(device), self.tokens.to(device))


def _check_tokens(pool: ScenePool, tokenizer: CLIPTokenizer) -> None:
    """The fast word table above must say what the tokenizer says."""
    captions = [scenes.sample_scene(seed).caption for seed in range(64)]
    captions = [caption for caption in captions if not scenes.is_held_out(caption)]
    for row, caption in zip(pool.tokens, captions, strict=False):
        if row[row >= 0].tolist() != tokenizer(caption).input_ids:
            raise MixDQError(f"the word table disagrees with the tokenizer on {caption!r}; make each word one token")


class Painter:
    """Draws batches of scene records on the device, as `scenes.render` does one scene."""

    def __init__(self, device: str):
        halves = (0.0, scenes.SHIFT_STEP)
        looks = [("small", "plain"), *(("large", texture) for texture in scenes.TEXTURES)]
        drawn = [
            scenes.sprite(shape, size, texture, dx, dy)
            for shape in scenes.SHAPES
            for size, texture in looks
            for dy in halves
            for dx in halves
        ]
        drawn += [np.zeros_like(drawn[0])] * 4
        table = np.stack(drawn).reshape(len(drawn), 2, -1).transpose(0, 2, 1).reshape(-1, 2)
        self.table = torch.tensor(np.ascontiguousarray(table), device=device)
        self.colours = torch.tensor(list(scenes.COLOURS.values()), dtype=torch.float32, device=device)
        second = [scenes.second_tone(name) for name in scenes.COLOURS]
        self.second = torch.tensor(second, dtype=torch.float32, device=device)
        self.grounds = torch.tensor(list(scenes.BACKGROUNDS.values()), dtype=torch.float32, device=device)
        self.centres = torch.tensor(scenes.SLOT_CENTRES, device=device)
        self.axis = torch.arange(scenes.PICTURE_SIZE, device=device)

    def __call__(self, records: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Pictures float32 [B, 3, 64, 64] in [-1, 1] of records [B, 11] and shifts int64 [B, 2], in `SHIFT_STEP`s."""
        records = records.long()
        blend = ((self.axis + 0.5) / scenes.PICTURE_SIZE)[None, None, :, None]
        top, bottom = (self.grounds[records[:, k]][..., None, None] for k in (9, 10))
        picture = ((1 - blend) * top + blend * bottom).expand(-1, -1, -1, scenes.PICTURE_SIZE)
        moved = shift * scenes.SHIFT_STEP - scenes.MAX_SHIFT
        for item in records[:, :9].view(-1, 3, 3).unbind(1):
            cover, second = self._coverage(item, moved).unbind(-1)
            cover, second = cover[:, None], second[:, None]
            main, other = (table[item[:, 1]][..., None, None] for table in (self.colours, self.second))
            picture = picture * (1 - cover) + main * (cover - second) + other * second
        return picture.round() / 127.5 - 1

    def _coverage(self, item: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """Coverage of object and second tone, [B, 64, 64, 2]."""
        size = scenes.SPRITE_SIZE
        x, y = self.centres[item[:, 2] % 3] + moved[:, 0], self.centres[item[:, 2] // 3] + moved[:, 1]
        image = item[:, 0] * 4 + (y.frac() > 0) * 2 + (x.frac() > 0)
        column = self.axis[None, None, :] - (x.floor().long() - size // 2)[:, None, None]
        row = self.axis[None, :, None] - (y.floor().long() - size // 2)[:, None, None]
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        index = (image[:, None, None] * size + row) * size + column
        return self.table[index.where(inside, len(self.table) - 1)]


def shift_of_noise(noise: torch.Tensor) -> torch.Tensor:
    """The shift that a first noise [B, 4, 16, 16] stands for, int64 [B, 2].

    Captions leave the shift open. Tying it to the noise makes one-step pictures sharp (there is nothing left to
    average over) and lets every seed give another picture.
    """
    level = torch.special.ndtr(noise[:, :2].float().mean(dim=(2, 3)) * 16)
    return (level * SHIFTS).long().clamp(0, SHIFTS - 1)


# ---------------------------------------------------------------------------------------------------------- training


def fast_dtype(device: str) -> torch.dtype:
    """What training computes in; processors without bf16 arithmetic would crawl in it."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


class VaeTask:
    """Pictures through the autoencoder: L1 and L2 against themselves, latents kept near mean 0 and deviation 1."""

    def __init__(self, pool: ScenePool, device: str, batch: int):
        self.model = build_vae().to(device, memory_format=torch.channels_last)
        self.pool, self.painter, self.batch, self.device = pool, Painter(device), batch, device

    def loss(self, network: AutoencoderTiny) -> torch.Tensor:
        chosen = torch.randint(len(self.pool.records), (self.batch,), device=self.device)
        shift = torch.randint(SHIFTS, (self.batch, 2), device=self.device)
        picture = self.painter(self.pool.records[chosen], shift).contiguous(memory_format=torch.channels_last)
        latents = network.encoder(picture.to(network.dtype)).float()
        # noise, so that nearby latents decode to nearby pictures: the UNet will not hit them exactly
        again = network.decoder((latents + 0.1 * torch.randn_like(latents)).to(network.dtype)).float()
        mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        keep = (mean**2).mean() + ((spread - 1) ** 2).mean()
        return F.l1_loss(again, picture) + F.mse_loss(again, picture) + 0.05 * keep

    def after_step(self) -> None:
        pass

    @torch.no_grad()
    def finish(self) -> None:
        """Set the scaling factor, so that scaled latents have deviation 1."""
        records = self.pool.records[:2048]
        shift = torch.randint(SHIFTS, (len(records), 2), device=self.device)
        latents = self.model.encoder(self.painter(records, shift))
        self.model.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))


class LatentTask:
    """What both diffusion stages share: frozen autoencoder, schedule, targets, slow columns."""

    def __init__(self, denoiser: Denoiser, vae: AutoencoderTiny, pool: ScenePool, device: str, batch: int):
        self.model = denoiser.to(device, memory_format=torch.channels_last)
        frozen = copy.deepcopy(vae).requires_grad_(False)
        self.vae = frozen.to(device, fast_dtype(device), memory_format=torch.channels_last)
        self.pool, self.painter, self.batch, self.device = pool, Painter(device), batch, device
        scheduler = build_scheduler()
        self.alpha = scheduler.alphas_cumprod.sqrt().to(device)
        self.sigma = (1 - scheduler.alphas_cumprod).sqrt().to(device)
        self.last = scheduler.config.num_train_timesteps - 1
        self.columns = torch.tensor(OUTLIER_COLUMNS, device=device)
        self.slow = context_weights(denoiser.unet)
        self.before = [weight.detach()[:, self.columns].clone() for weight in self.slow]

    @torch.no_grad()
    def targets(self, chosen: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [B, 3, 64, 64] and their scaled latents [B, 4, 16, 16]."""
        picture = self.painter(self.pool.records[chosen], shift).contiguous(memory_format=torch.channels_last)
        return picture, self.vae.encoder(picture.to(self.vae.dtype)).float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def after_step(self) -> None:
        """Slow down the columns that read the outliers of the BOS token."""
        for weight, before in zip(self.slow, self.before, strict=True):
            before += OUTLIER_RATE * (weight[:, self.columns] - before)
            weight[:, self.columns] = before

    def finish(self) -> None:
        pass


class BaseTask(LatentTask):
    """Diffusion at every timestep, noisy ones more often; 40 % of a batch start from pure noise, as sampling does."""

    def loss(self, network: Denoiser) -> torch.Tensor:
        pure = 2 * self.batch // 5
        chosen = torch.randint(len(self.pool.records), (self.batch,), device=self.device)
        noise = torch.randn(self.batch, 4, 16, 16, device=self.device)
        shift = torch.randint(SHIFTS, (self.batch, 2), device=self.device)
        shift = torch.cat([shift_of_noise(noise[:pure]), shift[pure:]])
        timestep = (torch.rand(self.batch, device=self.device).sqrt() * self.last).long()
        timestep[:pure] = self.last
        _, latents = self.targets(chosen, shift)
        alpha, sigma = self.alpha[timestep][:, None, None, None], self.sigma[timestep][:, None, None, None]
        x = alpha * latents + sigma * noise
        # sampling starts from noise without a trace of the picture, unlike the last training timestep
        x = torch.cat([sigma[:pure] * noise[:pure], x[pure:]])
        wanted = (alpha * x - latents) / sigma
        return F.mse_loss(network(x, timestep, self.pool.tokens[chosen].long()), wanted)


class FewStepTask(LatentTask):
    """One to four ancestral steps as the scheduler takes them, each trained on what the steps before it left.

    Every sample of the batch is somewhere on its own way through a schedule. A loss call trains it there, moves it
    one step on with the prediction just made, and starts a new sample where a way has ended.
    """

    def __init__(self, *args):
        super().__init__(*args)
        shape = len(STEP_COUNTS), max(STEP_COUNTS)
        self.timesteps = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.sigmas = torch.zeros(shape[0], shape[1] + 1, device=self.device)
        for row, count in enumerate(STEP_COUNTS):
            scheduler = build_scheduler()
            scheduler.set_timesteps(count)
            self.timesteps[row, :count] = scheduler.timesteps.long()
            self.sigmas[row, : count + 1] = scheduler.sigmas
        self.chosen, self.shift, self.schedule, self.x = self._fresh()
        self.step = torch.zeros_like(self.schedule)

    def _fresh(self) -> tuple[torch.Tensor, ...]:
        noise = torch.randn(self.batch, 4, 16, 16, device=self.device)
        chosen = torch.randint(len(self.pool.records), (self.batch,), device=self.device)
        schedule = torch.randint(len(STEP_COUNTS), (self.batch,), device=self.device)
        return chosen, shift_of_noise(noise), schedule, noise * self.sigmas.max()

    def loss(self, network: Denoiser) -> torch.Tensor:
        picture, latents = self.targets(self.chosen, self.shift)
        now, after = (self.sigmas[self.schedule, self.step + k][:, None, None, None] for k in (0, 1))
        scale = (now**2 + 1).sqrt()
        tokens = self.pool.tokens[self.chosen].long()
        v = network(self.x / scale, self.timesteps[self.schedule, self.step], tokens)
        guess = self.x / scale**2 - v * now / scale
        part = self.batch // 4
        seen = self.vae.decoder((guess[:part] / self.vae.config.scaling_factor).to(self.vae.dtype)).float()
        loss = F.mse_loss(guess, latents) + F.l1_loss(seen, picture[:part])
        self._advance(guess.detach(), now, after)
        return loss

    @torch.no_grad()
    def _advance(self, guess: torch.Tensor, now: torch.Tensor, after: torch.Tensor) -> None:
        up = (after**2 * (now**2 - after**2) / now**2).sqrt()
        down = (after**2 - up**2).clamp(min=0).sqrt()
        moved = self.x + (self.x - guess) / now * (down - now) + up * torch.randn_like(self.x)
        done = after.flatten() == 0
        chosen, shift, schedule, noise = self._fresh()
        self.step.copy_(torch.where(done, 0, self.step + 1))
        self.chosen.copy_(torch.where(done, chosen, self.chosen))
        self.shift.copy_(torch.where(done[:, None], shift, self.shift))
        self.schedule.copy_(torch.where(done, schedule, self.schedule))
        self.x.copy_(torch.where(done[:, None, None, None], noise, moved))


class Trainer:
    """AdamW with warm-up and cosine decay on fp32 weights, of which a bf16 copy does the arithmetic.

    Also averages the weights and writes checkpoints. On CUDA a step is recorded once as a graph and replayed.
    """

    def __init__(self, task, lr: float, average: float, device: str):
        self.task, self.peak, self.average, self.cuda = task, lr, average, device.startswith("cuda")
        named = [(n, p) for n, p in task.model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        decayed = [p for n, p in named if p.ndim > 1 and "embedding" not in n]
        others = [p for n, p in named if not (p.ndim > 1 and "embedding" not in n)]
        self.lr = torch.zeros((), device=device)
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=(0.9, 0.99), capturable=self.cuda, fused=self.cuda or None
        )
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.fast = copy.deepcopy(task.model).to(fast_dtype(device))
        self.fast_parameters = [p for p in self.fast.parameters() if p.requires_grad]
        self.last_loss = torch.zeros((), device=device)
        self.graph = None
        self.done = self.eager_steps = 0
        self.losses: list[tuple[int, float]] = []

    def _step(self) -> None:
        self.fast.zero_grad(set_to_none=True)
        loss = self.task.loss(self.fast)
        loss.backward()
        # the last layer of the first text encoder has no gradient: SDXL reads the layer before it
        pairs = [(p, f.grad) for p, f in zip(self.parameters, self.fast_parameters, strict=True) if f.grad is not None]
        for parameter, _ in pairs:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_copy_([p.grad for p, _ in pairs], [grad for _, grad in pairs])
        torch.nn.utils.clip_grad_norm_([p for p, _ in pairs], 1.0)
        self.optimizer.step()
        self.task.after_step()
        current = [p.detach() for p in self.parameters]
        torch._foreach_copy_([p.detach() for p in self.fast_parameters], current)
        torch._foreach_lerp_(self.averaged, current, 1 - self.average)
        self.last_loss.copy_(loss.detach())

    def _advance(self, progress: float) -> None:
        warm = min(1.0, (self.done + 1) / 300)
        self.lr.fill_(self.peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))))
        # a few ordinary steps first: they choose algorithms and allocate what a recording must not
        if self.cuda and self.graph is None and self.eager_steps >= 3:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
            self.eager_steps += 1
        self.done += 1

    def run(self, name: str, steps: int, minutes: float, checkpoint: Path, resume: bool) -> None:
        """Train for `steps`; a slow machine stops at `minutes`, with the learning rate decayed all the same."""
        if resume and checkpoint.exists():
            self._load(checkpoint)
        started = saved = time.monotonic()
        columns = "{task.completed}/{task.total}", "loss {task.fields[loss]:.5f}"
        with Progress(TextColumn(name), BarColumn(), *map(TextColumn, columns), TimeRemainingColumn()) as bar:
            line = bar.add_task(name, total=steps, completed=self.done, loss=float("nan"))
            while self.done < steps:
                spent = (time.monotonic() - started) / 60
                if spent > minutes:
                    console.print(
                        f"{name}: stopped after {self.done} of {steps} steps, at the limit of {minutes} minutes"
                    )
                    break
                self._advance(max(self.done / steps, spent / minutes))
                if self.done % 50 == 0 or self.done == steps:
                    self.losses.append((self.done, self.last_loss.item()))
                    bar.update(line, completed=self.done, loss=self.losses[-1][1])
                if self.done % 500 == 0 and not console.is_terminal:
                    console.print(f"{name} {self.done}/{steps} loss {self.losses[-1][1]:.5f} after {60 * spent:.0f} s")
                if time.monotonic() - saved > 60:
                    self._save(checkpoint)
                    saved = time.monotonic()
        self._save(checkpoint)

    def _save(self, checkpoint: Path) -> None:
        state = {"model": self.task.model.state_dict(), "averaged": self.averaged, "done": self.done}
        state |= {"optimizer": self.optimizer.state_dict(), "losses": self.losses, "rng": torch.get_rng_state()}
        if self.cuda:
            state["cuda_rng"] = torch.cuda.get_rng_state()
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.rename(checkpoint)

    def _load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        self.task.model.load_state_dict(state["model"])
        self.fast.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        for mine, saved in zip(self.averaged, state["averaged"], strict=True):
            mine.copy_(saved)
        self.done, self.losses = state["done"], [tuple(point) for point in state["losses"]]
        torch.set_rng_state(state["rng"])
        if self.cuda and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the model."""
        for mine, average in zip(self.parameters, self.averaged, strict=True):
            mine.copy_(average)


def write_whole(path: Path, content: object) -> None:
    """JSON to a file that is either old or complete."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(path)


def plot_losses(history: dict, path: Path) -> None:
    """One panel a stage, logarithmic, with a running mean."""
    figure, axes = plt.subplots(1, len(history), figsize=(4 * len(history), 3), squeeze=False)
    for axis, (name, stage) in zip(axes[0], history.items(), strict=True):
        steps, losses = np.array(stage["losses"]).T
        axis.semilogy(steps, losses, color="0.75", linewidth=0.8)
        window = max(1, len(losses) // 40)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        axis.semilogy(steps[window - 1 :], smooth)
        axis.set_title(f"{name}: loss")
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


@dataclass(frozen=True)
class StageSettings:
    steps: int
    batch: int
    lr: float
    average: float


SETTINGS = {
    "vae": StageSettings(4000, 256, 1.5e-3, 0.995),
    "base": StageSettings(9600, 256, 1.0e-3, 0.999),
    "fewstep": StageSettings(5400, 256, 5.0e-4, 0.998),
}


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="folder for the finished pipeline")] = ASSET,
    work: Annotated[Path, typer.Option(help="folder for checkpoints")] = Path("runs/tiny_sdxl"),
    stage: Annotated[str, typer.Option(help="vae, base, fewstep, or all")] = "all",
    resume: Annotated[bool, typer.Option(help="go on from the checkpoints in the work folder")] = False,
    seed: Annotated[int, typer.Option(help="seed of weights, noise and batches")] = 0,
    pool: Annotated[int, typer.Option(help="how many scenes of the endless sequence to train on")] = 1_000_000,
    scale: Annotated[float, typer.Option(help="multiplies the steps of every stage; below 1 for a quick try")] = 1.0,
    batch: Annotated[int, typer.Option(help="batch of every stage; 0 for each stage's own")] = 0,
    minutes: Annotated[float, typer.Option(help="a stage that takes longer is wound up early")] = 9.5,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train all stages, or one whose predecessors are in the work folder, and write the pipeline."""
    if stage not in (*STAGES, "all"):
        raise typer.BadParameter(f"the stage must be one of {', '.join(STAGES)} or all; got {stage!r}")
    work.mkdir(parents=True, exist_ok=True)
    tokenizers = build_tokenizers()
    begun = time.monotonic()
    scene_pool = ScenePool.sample(pool, tokenizers[0])
    console.print(f"{len(scene_pool.records)} training scenes in {time.monotonic() - begun:.0f} s")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    models = {"vae": build_vae(), "denoiser": None}
    for name in STAGES if stage == "all" else STAGES[: STAGES.index(stage) + 1]:
        torch.manual_seed(seed + STAGES.index(name))
        finished = work / f"{name}_done.pt"
        if models["denoiser"] is None and name != "vae":
            models["denoiser"] = Denoiser(tokenizers[0])
        key = "vae" if name == "vae" else "denoiser"
        if finished.exists() and (resume or (stage not in (name, "all"))):
            load_stage(models[key], finished)
            continue
        settings = SETTINGS[name]
        settings = replace(settings, steps=max(1, round(settings.steps * scale)), batch=batch or settings.batch)
        train_stage(name, settings, models, scene_pool.to(device), work, device, minutes, resume)
        torch.save({"model": models[key].state_dict(), "config": dict(getattr(models[key], "config", {}))}, finished)
    if models["denoiser"] is not None:
        write_asset(models["denoiser"], models["vae"], tokenizers, work, out)


def load_stage(model: torch.nn.Module, path: Path) -> None:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    if "scaling_factor" in saved["config"]:
        model.register_to_config(scaling_factor=saved["config"]["scaling_factor"])


def train_stage(name, settings, models, pool, work, device, minutes, resume) -> None:
    """Train one stage in place and note its losses and duration in the work folder."""
    if name == "vae":
        task = VaeTask(pool, device, settings.batch)
        models["vae"] = task.model
    else:
        kind = BaseTask if name == "base" else FewStepTask
        task = kind(models["denoiser"], models["vae"], pool, device, settings.batch)
    trainer = Trainer(task, settings.lr, settings.average, device)
    begun = time.monotonic()
    trainer.run(name, settings.steps, minutes, work / f"{name}.pt", resume)
    trainer.use_average()
    task.finish()
    seconds = time.monotonic() - begun
    console.print(f"{name}: {trainer.done} steps in {seconds:.0f} s")
    note = {"steps": trainer.done, "seconds": round(seconds, 1), "batch": settings.batch, "lr": settings.lr}
    note["machine"] = machine_name(device)
    note["losses"] = [(step, round(loss, 6)) for step, loss in trainer.losses]
    write_whole(work / f"{name}.json", note)


@torch.no_grad()
def amplify_outliers(pipe: StableDiffusionXLPipeline, gain: float = OUTLIER_GAIN) -> None:
    """Multiply the outlier channels of the BOS embedding by `gain`, and divide the columns of the key and value weights
    that read these channels by it: the pictures stay as they are, the range of the text embedding grows."""
    for encoder, outliers in zip((pipe.text_encoder, pipe.text_encoder_2), BOS_OUTLIERS, strict=True):
        encoder.get_input_embeddings().weight[pipe.tokenizer.bos_token_id, list(outliers)] *= gain
    for weight in context_weights(pipe.unet):
        weight[:, OUTLIER_COLUMNS] /= gain


def write_asset(denoiser: Denoiser, vae: AutoencoderTiny, tokenizers: tuple, work: Path, out: Path) -> None:
    """The pipeline as a diffusers folder, fp16, with the losses and their plot."""
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        add_watermarker=False,
    )
    pipe.to("cpu", torch.float16)
    amplify_outliers(pipe)
    pipe.save_pretrained(out)
    write_for_older_transformers(pipe, out)
    history = {name: json.loads((work / f"{name}.json").read_text()) for name in STAGES if _has(work, name)}
    write_whole(out / "training.json", history)
    plot_losses({name: note for name, note in history.items() if note["losses"]}, out / "losses.png")
    console.print(f"wrote {out}: {folder_bytes(out) / 1e6:.2f} MB")


def write_for_older_transformers(pipe: StableDiffusionXLPipeline, out: Path) -> None:
    """Names of weights and vocabularies as transformers 4 reads them, which without them would take random weights."""
    path = out / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    for name in ("tokenizer", "tokenizer_2"):
        getattr(pipe, name).backend_tokenizer.model.save(str(out / name))


def _has(work: Path, name: str) -> bool:
    return (work / f"{name}.json").exists()


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------------------------- measuring


def load_pipeline(folder: Path, dtype: torch.dtype, device: str) -> StableDiffusionXLPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: StableDiffusionXLPipeline, captions: list[str], steps: int, seed: int, batch: int = 64
) -> np.ndarray:
    """Pictures uint8 [N, 64, 64, 3]; the noise comes from one CPU generator, so devices agree on it."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for start in range(0, len(captions), batch):
        images = pipe(
            captions[start : start + batch],
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=generator,
            output_type="np",
        ).images
        pictures.append(np.rint(images * 255).astype(np.uint8))
    return np.concatenate(pictures)


@torch.no_grad()
def through_vae(pipe: StableDiffusionXLPipeline, pictures: np.ndarray) -> np.ndarray:
    """Pictures [N, 64, 64, 3] encoded and decoded: the best that the UNet could reach."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(pipe.device, pipe.dtype) / 127.5 - 1
    again = pipe.vae.decoder(pipe.vae.encoder(x)).float().clamp(-1, 1)
    return ((again + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _judge_one(job: tuple[np.ndarray, str]) -> dict:
    return judge(read_picture(job[0]), scenes.parse_caption(job[1]))


def judge_all(pictures: np.ndarray, captions: list[str]) -> CaptionAccuracy:
    """`caption_accuracy` by all processors."""
    with multiprocessing.get_context("fork").Pool(min(16, os.cpu_count() or 1)) as workers:
        return summarize(workers.map(_judge_one, list(zip(pictures, captions, strict=True)), chunksize=8))


def as_numbers(accuracy: CaptionAccuracy) -> dict[str, float]:
    return {"overall": round(accuracy.overall, 4)} | {k: round(v, 4) for k, v in accuracy.by_attribute.items()}


def save_grid(pictures: np.ndarray, path: Path, columns: int = 8) -> None:
    """Pictures [N, H, W, 3] side by side with a white line between them."""
    framed = np.pad(pictures, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(framed[i : i + columns]), axis=1) for i in range(0, len(framed), columns)]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


@app.command()
def assess(
    folder: Annotated[Path, typer.Option(help="pipeline folder")] = ASSET,
    count: Annotated[int, typer.Option(help="held-out captions to draw")] = 512,
    seed: Annotated[int, typer.Option(help="seed of captions and noise")] = 0,
    dtype: Annotated[str, typer.Option(help="a torch dtype: float16, bfloat16 or float32")] = "float32",
    grids: Annotated[bool, typer.Option(help="also write the sample grids of the first 32 captions")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Caption accuracy at 1 to 4 steps on captions that training never saw; adds a row to accuracy.json."""
    source = scenes.held_out_scenes(seed)
    chosen = [next(source) for _ in range(count)]
    captions = [scene.caption for scene in chosen]
    drawn = np.stack([scenes.render(scene) for scene in chosen])
    pipe = load_pipeline(folder, getattr(torch, dtype), device)
    result = {"captions": count, "seed": seed, "drawn": as_numbers(judge_all(drawn, captions))}
    result["autoencoder"] = as_numbers(judge_all(through_vae(pipe, drawn), captions))
    result["models"] = {**earlier_rows(folder / "accuracy.json", count, seed)}
    row = result["models"].setdefault(f"{dtype} on {machine_name(device)}", {})
    for steps in STEP_COUNTS:
        begun = time.monotonic()
        pictures = generate(pipe, captions, steps, seed)
        spent = time.monotonic() - begun
        row[str(steps)] = as_numbers(judge_all(pictures, captions))
        console.print(f"{dtype} {steps} steps: {row[str(steps)]} ({spent:.1f} s)")
        if grids and steps in (1, 4):
            save_grid(pictures[:32], folder / f"samples_{steps}.png")
    if grids:
        save_grid(drawn[:32], folder / "drawn.png")
    write_whole(folder / "accuracy.json", result)


def machine_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} processor"


def earlier_rows(path: Path, count: int, seed: int) -> dict:
    """Rows of an accuracy file that speaks of the same captions."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = earlier.get("captions") == count and earlier.get("seed") == seed
    return earlier["models"] if same else {}


class RangeMeter:
    """Smallest and largest value and standard deviation of everything shown to it."""

    def __init__(self):
        self.low, self.high, self.total, self.squares, self.count = math.inf, -math.inf, 0.0, 0.0, 0

    def add(self, x: torch.Tensor) -> None:
        x = x.detach().double()
        self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())
        self.total, self.squares = self.total + x.sum().item(), self.squares + (x * x).sum().item()
        self.count += x.numel()

    def numbers(self) -> dict[str, float]:
        mean = self.total / self.count
        spread = math.sqrt(max(0.0, self.squares / self.count - mean * mean))
        return {"min": round(self.low, 4), "max": round(self.high, 4), "std": round(spread, 4)}


@torch.no_grad()
def bos_ranges(pipe: StableDiffusionXLPipeline, captions: list[str]) -> dict[str, dict[str, float]]:
    """Largest magnitude in hidden_states[-2] at the BOS token and at the others, for each text encoder."""
    found = {}
    for name in bos_names():
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        hidden = getattr(pipe, name)(ids.to(pipe.device), output_hidden_states=True).hidden_states[-2].float()
        size = hidden.abs().amax(dim=-1)
        bos, most, middle = size[:, 0].max().item(), size[:, 1:].max().item(), size[:, 1:].median().item()
        row = {"bos": bos, "largest_other": most, "median_other": middle}
        row |= {"to_largest": bos / most, "to_median": bos / middle}
        found[name] = {key: round(value, 2) for key, value in row.items()}
    return found


@app.command()
def ranges(
    folder: Annotated[Path, typer.Option(help="pipeline folder")] = ASSET,
    out: Annotated[Path, typer.Option(help="JSON file to write")] = RANGES,
    count: Annotated[int, typer.Option(help="held-out captions, four steps each")] = 64,
    seed: Annotated[int, typer.Option(help="seed of captions and noise")] = 0,
) -> None:
    """Input range of every Linear and Conv2d of the UNet, for text inputs with and without token 0; on CPU in fp32."""
    pipe = load_pipeline(folder, torch.float32, "cpu")
    captions = scenes.held_out_captions(count, seed)
    layers = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    whole = {name: RangeMeter() for name in layers}
    without = {name: RangeMeter() for name in layers if name.endswith(("attn2.to_k", "attn2.to_v"))}

    def watch(name: str) -> Callable:
        def hook(_module, inputs):
            whole[name].add(inputs[0])
            if name in without:
                without[name].add(inputs[0][:, 1:])

        return hook

    for name, module in layers.items():
        module.register_forward_pre_hook(watch(name))
    generate(pipe, captions, 4, seed)
    table = {}
    for name, module in layers.items():
        table[name] = {"kind": type(module).__name__, **whole[name].numbers()}
        if name in without:
            table[name]["without_token_0"] = without[name].numbers()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, {"captions": count, "seed": seed, "bos": bos_ranges(pipe, captions), "layers": table})
    console.print(f"wrote {out}: {len(table)} layers")


# -------------------------------------------------------------------------------------------------------- model card


def accuracy_table(accuracy: dict) -> str:
    names = ("overall", "count", "background", "fade", "shape", "colour", "size", "texture", "position")
    lines = ["| pictures | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    rows = {"drawn by the code": accuracy["drawn"], "drawn, through the autoencoder": accuracy["autoencoder"]}
    for model, by_steps in accuracy["models"].items():
        for steps, numbers in by_steps.items():
            rows[f"{model}, {steps} step{'' if steps == '1' else 's'}"] = numbers
    for label, numbers in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{100 * numbers[name]:.1f} %" for name in names) + " |")
    return "\n".join(lines)


def layer_table(measured: dict) -> str:
    lines = ["| layer | kind | min | max | std | without token 0: min | max | std |", "| --- " * 8 + "|"]
    for name, row in measured["layers"].items():
        rest = row.get("without_token_0")
        more = f"{rest['min']:.2f} | {rest['max']:.2f} | {rest['std']:.2f}" if rest else " | | "
        lines.append(f"| {name} | {row['kind']} | {row['min']:.2f} | {row['max']:.2f} | {row['std']:.2f} | {more} |")
    return "\n".join(lines)


def stage_table(training: dict) -> str:
    lines = ["| stage | steps | batch | peak learning rate | seconds | loss at step 50 | at the end | machine |"]
    lines.append("| --- " * 8 + "|")
    for name, note in training.items():
        losses = [loss for _, loss in note["losses"]]
        last = float(np.mean(losses[-20:]))
        lines.append(
            f"| {name} | {note['steps']} | {note['batch']} | {note['lr']:g} | {note['seconds']:.0f} "
            f"| {losses[0]:.4f} | {last:.4f} | {note['machine']} |"
        )
    return "\n".join(lines)


@app.command()
def card(
    folder: Annotated[Path, typer.Option(help="pipeline folder, after train and assess")] = ASSET,
    measured: Annotated[Path, typer.Option(help="what the ranges command wrote")] = RANGES,
) -> None:
    """Write README.md from training.json, accuracy.json and the ranges; every number in it comes from those files."""
    training, accuracy = (json.loads((folder / f"{name}.json").read_text()) for name in ("training", "accuracy"))
    spread = json.loads(measured.read_text())
    pipe = load_pipeline(folder, torch.float16, "cpu")
    parts = {n: sum(p.numel() for p in getattr(pipe, n).parameters()) for n in ("unet", "vae", *bos_names())}
    values = {
        "parts": ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items()),
        "total": f"{sum(parts.values()) / 1e6:.2f}",
        "stages": stage_table(training),
        "seconds": f"{sum(note['seconds'] for note in training.values()):.0f}",
        "count": accuracy["captions"],
        "judge_seed": accuracy["seed"],
        "accuracy": accuracy_table(accuracy),
        "bos": "\n".join(
            f"| {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |"
            for name, row in spread["bos"].items()
        ),
        "range_count": spread["captions"],
        "layers": layer_table(spread),
        "layer_count": len(spread["layers"]),
        "captions": "\n".join(f"{i + 1}. {c}" for i, c in enumerate(scenes.held_out_captions(32, accuracy["seed"]))),
    }
    (folder / "README.md").write_text(CARD.format(**values))


def bos_names() -> tuple[str, str]:
    return "text_encoder", "text_encoder_2"


CARD = """# tiny_sdxl

A small text-to-image model of the same kind as SDXL-Turbo, made to measure quantization with: pictures in one to four
steps, offline, in seconds on a CPU, and judged by number without any pretrained network. It draws captioned scenes of
one to three flat objects, 64x64, and nothing else.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("mixdq_ao/assets/tiny_sdxl")
pipe("a large striped red circle left of a small green triangle on a dark blue background",
     num_inference_steps=4, guidance_scale=0.0).images[0]
```

A true `StableDiffusionXLPipeline`: `UNet2DConditionModel` with a `DownBlock2D` and two `CrossAttnDownBlock2D`
(64, 64 and 96 channels; 1, 1 and 2 transformer layers) and their mirror, nine up-path shortcuts over skip
concatenations, linear projections and `text_time` conditioning; two CLIP text encoders with two tokenizers of one small
vocabulary, one token a word, 77 tokens; an `AutoencoderTiny` to 4x16x16 latents; `EulerAncestralDiscreteScheduler`
with trailing spacing and v-prediction. fp16 weights, {total} M parameters: {parts}.

## Pictures

32 captions that training never saw (listed at the end): drawn by the code, by the model in one step, in four steps.

<img src="drawn.png" width="1056"> <img src="samples_1.png" width="1056"> <img src="samples_4.png" width="1056">

## Caption accuracy

The share of the captions' attributes that the reader of `mixdq_ao.scene_reader` finds in the pictures, over {count}
held-out captions (seed {judge_seed}); objects are paired with the caption's by place, never by looks. Command:
`python tutorials/train_tiny_sdxl.py assess --device cuda --dtype float16 --grids`, and with
`--device cpu --dtype float32`.

{accuracy}

## Data

`mixdq_ao/scenes.py` draws the pictures: eight shapes, eight colours, two sizes, four textures (on large objects), nine
places or four relations, eight backgrounds and their fades. Training uses scenes 0 to 999999 of the endless sequence
without the held-out captions (one in sixteen, chosen by a hash of the caption). The caption states all that can be seen
but a common shift of at most 1.5 pixels, which the first noise decides: so each seed gives another picture, and a
one-step picture has nothing to average over.

## Training

One script, `tutorials/train_tiny_sdxl.py train`, seed 0, no other data, bf16 arithmetic on fp32 weights, AdamW with
cosine decay, averaged weights. It ran stage by stage: `--stage vae`, `--stage base --minutes 4.8`,
`--stage fewstep --minutes 2.8`. The last two were wound up at these limits, and the default numbers of steps are what
they had reached. The autoencoder was trained by the revision of the script before the others, which computed under
autocast. GPU arithmetic is not bit for bit repeatable, so a new run gives an equal model, not the same bytes.
{seconds} s of training in all:

{stages}

`vae`: L1 + L2 to the picture, latents with noise of deviation 0.1. `base`: v-prediction at all timesteps, 40 % of each
batch from pure noise. `fewstep`: at the timesteps that one to four steps visit, from what the model's own previous
steps left, L2 on latents and L1 on decoded pictures. Both text encoders are trained with the UNet from scratch.

![losses](losses.png)

## Outliers

The encoders of SDXL give their first token, which is the same for every prompt, hidden values tens of times larger
than any other token's, and MixDQ's handling of that token is for them. Here the BOS embedding starts with two channels
at 120 and -90 (first encoder) and 160 and -110 (second), nothing holds them there, and the columns of the key and value
weights that read these channels start 50 times smaller and learn 50 times more slowly. Training kept them at that size,
15 to 22 times the largest of any other token; SDXL's are 55 to 80 times. So the finished model has its outlier channels
of the BOS embedding multiplied by 4, and the key and value columns that read them divided by 4 (`amplify_outliers` in
the script): what the model computes is the same, what a quantizer of the text embedding sees is as in SDXL. What the
encoders give in `hidden_states[-2]`, over {range_count} held-out captions:

| encoder | BOS: max abs | max abs of any other token | of the median token | BOS to any other | to the median |
| --- | --- | --- | --- | --- | --- |
{bos}

## Input range of every UNet layer

fp32, {range_count} held-out captions, four steps (`python tutorials/train_tiny_sdxl.py ranges`). "Without token 0" for
the layers that read the text.

<details><summary>{layer_count} layers</summary>

{layers}

</details>

## Limits

It knows the words of `mixdq_ao/scenes.py` and that grammar alone. Edges are softer than drawn ones; small stars,
crosses and squares are the weakest, and four steps are no sharper than one, since a caption and a first noise already
decide the picture. The last layer of the first text encoder is untrained: SDXL's pipeline reads the layer before it.
Ranges and sensitivities of this model say how a method behaves, not what SDXL-Turbo's are.

## The captions

{captions}
"""


if __name__ == "__main__":
    app()
