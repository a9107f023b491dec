"""A stand-in for a diffusers text-to-image pipeline, fast and without files."""

import hashlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel, UNet2DConditionModel

TOKENS, WIDTH, POOLED = 7, 64, 32


class FakePipeline:
    """Calls its UNet as SDXL's pipelines do; prompts become random tokens behind a constant, large BOS token."""

    def __init__(self, seed: int = 0, size: int = 8):
        self.unet = micro_unet(seed)
        self.size = size

    def set_progress_bar_config(self, **kwargs):
        pass

    def _text(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big"))
        tokens = torch.randn(TOKENS, WIDTH, generator=g)
        tokens[0] = torch.linspace(-40, 100, WIDTH)
        return tokens, torch.randn(POOLED, generator=g)

    def _predict(self, x, t, texts, pooled) -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": torch.full((len(x), 6), 16.0)}
        return self.unet(x, t, texts, added_cond_kwargs=added, return_dict=False)[0]

    def __call__(self, prompt, num_inference_steps, guidance_scale, generator, output_type):
        assert guidance_scale == 0.0
        texts, pooled = (torch.stack(t) for t in zip(*map(self._text, prompt), strict=True))
        x = torch.stack([torch.randn(4, self.size, self.size, generator=g) for g in generator])
        for step in range(num_inference_steps):
            t = torch.tensor(999.0 * (1 - step / num_inference_steps))
            x = x - self._predict(x, t, texts, pooled) / num_inference_steps
        if output_type == "latent":
            return SimpleNamespace(images=x)
        pictures = F.interpolate(x[:, :3], scale_factor=4, mode="bilinear").sigmoid()
        return SimpleNamespace(images=pictures if output_type == "pt" else pictures.permute(0, 2, 3, 1).numpy())


class FakeTransformerPipeline(FakePipeline):
    """The same around a transformer."""

    def __init__(self, seed: int = 0, size: int = 8):
        self.transformer = micro_transformer(seed)
        self.size = size

    def _predict(self, x, t, texts, pooled) -> torch.Tensor:
        return self.transformer(x, texts, t.expand(len(x)) / 1000, return_dict=False)[0]


def micro_transformer(seed: int = 0):
    """Of Sana's kind: 2 of its 29 layers are grouped convolutions, 6 see text."""
    torch.manual_seed(seed)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
    ).eval()


def micro_unet(seed: int = 0):
    """SDXL's conditioning and block types in 85 small layers; takes what ``models.unet_inputs`` makes."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED,
        norm_num_groups=8,
    ).eval()


def prompts(count: int) -> list[str]:
    return [f"prompt number {i}" for i in range(count)]
