"""Every linear, convolution and attention of SDXL's UNet, from its configuration alone: no diffusers, no torch."""

from collections import Counter
from dataclasses import dataclass

CHANNELS = (320, 640, 1280)
TRANSFORMER_BLOCKS = (0, 2, 10)  # in each transformer of a level
RESNETS = 2  # of a level on the way down, and one more on the way up
TEXT_TOKENS, TEXT_CHANNELS = 77, 2048
EMBEDDING, CONDITIONS = 1280, 2816
HEAD_CHANNELS = 64


@dataclass(frozen=True)
class Linear:
    """``[m, k]`` times ``weights`` matrices ``[n, k]``."""

    m: int
    n: int
    k: int
    weights: int = 1

    taps, stride = 1, 1

    def __str__(self) -> str:
        return f"linear {self.m} x {self.k} -> {self.n}" + (f" x {self.weights}" if self.weights > 1 else "")

    @property
    def columns(self) -> int:
        return self.n * self.weights

    @property
    def flops(self) -> int:
        return 2 * self.m * self.columns * self.k


@dataclass(frozen=True)
class Conv:
    """A square window over ``[batch, channels, size, size]``, padded so that stride 1 keeps the size."""

    batch: int
    size: int
    channels: int
    n: int
    kernel: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        window = f"{self.kernel}x{self.kernel}"
        return f"conv {window}{stride} {self.batch} x {self.size}^2 x {self.channels} -> {self.n}"

    @property
    def pad(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def m(self) -> int:
        return self.batch * self.out_size**2

    @property
    def taps(self) -> int:
        return self.kernel**2

    @property
    def k(self) -> int:
        return self.taps * self.channels

    @property
    def columns(self) -> int:
        return self.n

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


Layer = Linear | Conv


@dataclass(frozen=True)
class Attention:
    """``tokens`` queries of each image see ``keys`` keys."""

    batch: int
    heads: int
    tokens: int
    keys: int

    def __str__(self) -> str:
        return f"attention {self.batch} x {self.heads} heads, {self.tokens} x {self.keys}"

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.tokens * self.keys * HEAD_CHANNELS


def layers(pixels: int, batch: int) -> Counter[Layer]:
    """Every layer of one step for pictures of that many pixels a side, and how often it comes."""
    found: Counter[Layer] = Counter()
    latent = pixels // 8

    def linear(m: int, n: int, k: int, count: int = 1):
        found[Linear(m * batch, n, k)] += count

    def resnet(size: int, channels: int, out: int):
        found[Conv(batch, size, channels, out, 3)] += 1
        linear(1, out, EMBEDDING)
        found[Conv(batch, size, out, out, 3)] += 1
        if channels != out:
            found[Conv(batch, size, channels, out, 1)] += 1

    def transformer(size: int, c: int, blocks: int):
        if blocks:
            # proj_in and proj_out; in each block q, k, v, out of self-attention, and q, out of cross-attention.
            linear(size**2, c, c, 2 + 6 * blocks)
            linear(TEXT_TOKENS, c, TEXT_CHANNELS, 2 * blocks)
            linear(size**2, 8 * c, c, blocks)
            linear(size**2, c, 4 * c, blocks)

    linear(1, EMBEDDING, CHANNELS[0])
    linear(1, EMBEDDING, CONDITIONS)
    linear(1, EMBEDDING, EMBEDDING, 2)
    found[Conv(batch, latent, 4, CHANNELS[0], 3)] += 1
    skips, channels, last = [CHANNELS[0]], CHANNELS[0], len(CHANNELS) - 1
    for level, out in enumerate(CHANNELS):
        size = latent >> level
        for _ in range(RESNETS):
            resnet(size, channels, out)
            transformer(size, out, TRANSFORMER_BLOCKS[level])
            channels = out
            skips.append(out)
        if level < last:
            found[Conv(batch, size, out, out, 3, stride=2)] += 1
            skips.append(out)
    size = latent >> last
    resnet(size, channels, channels)
    transformer(size, channels, TRANSFORMER_BLOCKS[last])
    resnet(size, channels, channels)
    for level in range(last, -1, -1):
        size, out = latent >> level, CHANNELS[level]
        for _ in range(RESNETS + 1):
            resnet(size, channels + skips.pop(), out)
            transformer(size, out, TRANSFORMER_BLOCKS[level])
            channels = out
        if level:
            found[Conv(batch, 2 * size, out, out, 3)] += 1
    found[Conv(batch, latent, CHANNELS[0], 4, 3)] += 1
    return found


def merged(pixels: int, batch: int) -> list[Linear]:
    """Siblings as one product: q, k, v of self-attention, and the projections of the text and of the time embedding."""
    found = []
    for level, (c, blocks) in enumerate(zip(CHANNELS, TRANSFORMER_BLOCKS, strict=True)):
        tokens = (pixels // 8 >> level) ** 2
        if blocks:
            found.append(Linear(tokens * batch, c, c, 3))
            found += [Linear(TEXT_TOKENS * batch, c, TEXT_CHANNELS, weights) for weights in (2, 4)]
        found += [Linear(batch, c, EMBEDDING, weights) for weights in (2, 4)]
    return found


def attentions(pixels: int, batch: int) -> Counter[Attention]:
    """Every attention of one step, and how often it comes: of the picture to itself, and to the text."""
    found: Counter[Attention] = Counter()
    last = len(CHANNELS) - 1
    for level, (c, blocks) in enumerate(zip(CHANNELS, TRANSFORMER_BLOCKS, strict=True)):
        tokens = (pixels // 8 >> level) ** 2
        count = (2 * RESNETS + 1 + (level == last)) * blocks  # the way down, the way up, the middle
        for keys in (tokens, TEXT_TOKENS):
            found[Attention(batch, c // HEAD_CHANNELS, tokens, keys)] += count
    return +found
