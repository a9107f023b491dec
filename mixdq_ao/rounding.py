"""Better rounding of low-bit weights from calibration data, at unchanged scales.

Rounding each weight to the nearest code has the least error in the weight, not in the layer's output. GPTQ (Frantar et
al., arXiv 2210.17323) rounds the input channels of a layer one after another and lets the channels that are still to
come make up for each error, so that ``|| (W - W_hat) X ||^2`` over the calibration inputs X gets small. All that it
needs of X is the Gram matrix ``X X^T``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixdq_ao import families
from mixdq_ao.bits import width
from mixdq_ao.errors import MixDQError, name_list
from mixdq_ao.packing import pack
from mixdq_ao.progress import track
from mixdq_ao.tensor import MixDQTensor
from mixdq_ao.watching import watching

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, added to it
GRAM_MEMORY = 4 * 2**30  # bytes; a 3x3 convolution of 1280 channels alone takes half a GiB
_BLOCK = 128  # columns between updates of all that follow
_UNFOLD_BYTES = 2**28


@contextmanager
def watch_grams(
    model: nn.Module, layers: Iterable[str], without_bos: Iterable[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """While the block runs, add up the Gram matrix of the inputs of ``layers`` of a floating model.

    Gives layer -> float32 ``[k, k]``, k = in channels times kernel size, in the order of ``weight.flatten(1)``; filled
    when the block ends. ``without_bos`` names layers whose first token does not count, because its output is known.
    """
    modules = families.layers_of(model)
    without_bos = set(without_bos)
    grams: dict[str, Tensor] = {}

    def note_of(name: str):
        module = modules[name]

        def note(x: Tensor) -> None:
            if name in without_bos:
                x = x[:, 1:]
            for columns in _columns(module, x.float()):
                gram = columns @ columns.T
                grams[name] = grams[name].add_(gram) if name in grams else gram

        return note

    with watching(model, {name: note_of(name) for name in layers}):
        yield grams


def _columns(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The layer's input as matrices ``[k, positions]``."""
    if isinstance(module, nn.Linear):
        yield x.reshape(-1, x.shape[-1]).T
        return
    if isinstance(module.padding, str):
        raise MixDQError(f"better rounding needs a convolution's padding as numbers; found {module.padding!r}")
    per_picture = module.weight[0].numel() * x.shape[2] * x.shape[3] * 4
    for part in x.split(max(1, _UNFOLD_BYTES // per_picture)):
        unfolded = F.unfold(part, module.kernel_size, module.dilation, module.padding, module.stride)
        yield unfolded.transpose(0, 1).flatten(1)


def round_weights_(
    quantized: nn.Module,
    floating: nn.Module,
    grams: Mapping[str, Tensor],
    progress: bool | None = None,
) -> dict[str, float]:
    """Round the weights of ``quantized`` anew, in place, for the inputs that ``grams`` (:func:`watch_grams`) saw.

    Scales, activation parameters and BOS outputs stay as they are, so that nothing is different for a kernel; the codes
    go wherever the model goes, ``mixdq_ao.save`` included. ``floating`` is the model before it was quantized.

    Returns for each layer the error of its output, ``|| (W - W_hat) X ||``, as a share of the error before; a layer
    that would not gain keeps its codes and has 1. Raises ``MixDQError`` for a layer that is not quantized.
    """
    modules, originals = families.layers_of(quantized), families.layers_of(floating)
    bare = [n for n in grams if not isinstance(modules[n].weight if n in modules else None, MixDQTensor)]
    if bare:
        raise MixDQError(f"only quantized layers can be rounded; these are not: {name_list(bare)}")
    shares = {}
    for name, gram in track(grams.items(), "Rounding", len(grams), progress):
        old = modules[name].weight
        weight = originals[name].weight.detach().float()
        codes = gptq_codes(weight, gram, old.scale, old.bits, old.input_groups)
        new = _with_codes(old, codes)
        before, after = (_output_error(weight - w.dequantize(torch.float32), gram) for w in (old, new))
        shares[name] = 1.0
        if after < before:
            shares[name] = (after / before) ** 0.5
            modules[name].weight = nn.Parameter(new, requires_grad=False)
    return shares


def round_from_data_(
    quantized: nn.Module,
    floating: nn.Module,
    run: Callable[[], object],
    *,
    without_bos: Iterable[str] = (),
    memory: int = GRAM_MEMORY,
    progress: bool | None = None,
) -> dict[str, float]:
    """Round all weights below 8 bits of ``quantized`` anew, in place; ``run`` runs ``floating`` on calibration data.

    It is called as often as needed to hold no more than ``memory`` bytes of Gram matrices (and one layer) at a time.
    See :func:`watch_grams` and :func:`round_weights_`.
    """
    weights = {n: m.weight for n, m in families.layers_of(quantized).items() if isinstance(m.weight, MixDQTensor)}
    sides = {name: w.shape[1:].numel() for name, w in weights.items() if w.bits < 8}
    shares = {}
    for names in _groups({name: 4 * side**2 for name, side in sides.items()}, memory):
        with watch_grams(floating, names, without_bos) as grams:
            run()
        shares |= round_weights_(quantized, floating, grams, progress)
    return shares


def _groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut where their sizes add up to more than ``limit``; at least one a group."""
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def gptq_codes(weight: Tensor, gram: Tensor, scale: Tensor, bits: int, input_groups: list[int]) -> Tensor:
    """Codes int8 of the shape of ``weight [out, in, ...]`` for scales ``[groups, out]`` and a Gram matrix ``[k, k]``.

    Columns are taken in the order of their energy, largest first: what has the most weight is rounded while there is
    the most left to make up for it.
    """
    w = width(bits)
    rows = weight.flatten(1).double()
    per_channel = rows.shape[1] // sum(input_groups)
    counts = torch.tensor(input_groups, device=scale.device) * per_channel
    scales = scale.double().T.repeat_interleave(counts, dim=1)  # [out, k]
    gram = gram.double()
    order = gram.diagonal().argsort(descending=True)
    rows, scales, gram = rows[:, order].clone(), scales[:, order], gram[order][:, order]
    factor = _inverse_factor(gram)
    codes = torch.empty_like(rows)
    for start in range(0, rows.shape[1], _BLOCK):
        stop = min(start + _BLOCK, rows.shape[1])
        errors = torch.empty_like(rows[:, start:stop])
        for k in range(start, stop):
            codes[:, k] = (rows[:, k] / scales[:, k]).round_().clamp_(w.qmin, w.qmax)
            error = (rows[:, k] - codes[:, k] * scales[:, k]) / factor[k, k]
            rows[:, k + 1 : stop] -= error[:, None] * factor[k, k + 1 : stop]
            errors[:, k - start] = error
        rows[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes[:, order.argsort()].view(weight.shape).to(torch.int8)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with ``U^T U = (gram + damping)^-1``."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean()) or 1.0
    damped = gram + DAMPING * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _output_error(difference: Tensor, gram: Tensor) -> float:
    rows = difference.flatten(1).double()
    return max(0.0, float(((rows @ gram.double()) * rows).sum()))  # a sum of squares, but for its rounding


def _with_codes(old: MixDQTensor, codes: Tensor) -> MixDQTensor:
    return MixDQTensor.from_codes(
        pack(codes, old.bits, old.input_groups),
        old.scale,
        bits=old.bits,
        shape=old.shape,
        dtype=old.dtype,
        input_groups=old.input_groups,
        act_bits=old.act_bits,
        act_scale=old.act_scale,
        act_zero_point=old.act_zero_point,
        bos_input=old.bos_input,
        bos_output=old.bos_output,
    )
