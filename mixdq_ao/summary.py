"""What every layer of a model stores and computes, and the bytes that it all takes."""

import json
from dataclasses import asdict, dataclass

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixdq_ao import families, ops
from mixdq_ao.model_file import FileDescription, FileRow
from mixdq_ao.tensor import MixDQTensor

MIB = 2**20


@dataclass(frozen=True)
class LayerRow:
    """One layer: ``weight_bits`` as stored, ``computes`` as multiplied, ``bytes`` of the weight's real storages."""

    name: str
    kind: str
    shape: list[int]
    quantized: bool
    weight_bits: int
    act_bits: int | None
    activation: str
    computes: str
    kernel: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class Summary:
    """``rows`` of all linear and convolution layers, and byte totals over real storages; printable."""

    rows: list[LayerRow]
    quantized_bytes: int
    floating_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.quantized_bytes + self.floating_bytes

    def to_json(self) -> str:
        """All rows and totals for programs."""
        totals = {k: getattr(self, k) for k in ("quantized_bytes", "floating_bytes", "total_bytes")}
        return json.dumps({"layers": [asdict(r) for r in self.rows], **totals}, indent=1)

    def __str__(self) -> str:
        header = ("layer", "kind", "shape", "weight", "activation", "computes", "kernel", "reason", "KiB")
        return format_table(header, [_cells(r) for r in self.rows]) + "\n" + self.totals()

    def totals(self) -> str:
        """The last lines of the table: how many layers of each kind, and MiB."""
        widths = {bits: sum(r.weight_bits == bits for r in self.rows) for bits in (8, 4, 2, 16, 32)}
        counted = ", ".join(f"{n} with {bits}-bit weights" for bits, n in widths.items() if n)
        return (
            f"{len(self.rows)} layers: {counted}\n"
            f"{self.total_bytes / MIB:.1f} MiB in all: {self.quantized_bytes / MIB:.1f} MiB quantized, "
            f"{self.floating_bytes / MIB:.1f} MiB floating"
        )


def summary(model: nn.Module) -> Summary:
    """Per layer bits stored, bits computed, kernel and reason, and totals in bytes; print it, or take ``rows``."""
    rows = [_row(name, module) for name, module in families.layers_of(model).items()]
    tensors = [*model.parameters(), *model.buffers()]
    quantized = storage_bytes(t for t in tensors if isinstance(t, MixDQTensor))
    return Summary(rows, quantized, storage_bytes(tensors) - quantized)


def storage_bytes(tensors) -> int:
    """Bytes of all storages behind ``tensors``, inner tensors of subclasses included, each storage once."""
    seen = {}
    for t in tensors:
        for plain in _plain_tensors(t):
            storage = plain.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def _plain_tensors(t: Tensor):
    if is_traceable_wrapper_subclass(t):
        for name in t.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(t, name))
    else:
        yield t


def _row(name: str, module: nn.Module) -> LayerRow:
    w = module.weight
    kind = "linear" if isinstance(module, nn.Linear) else "conv2d"
    quantized = isinstance(w, MixDQTensor)
    int8 = quantized and w.act_bits is not None
    dtype = str(w.dtype).removeprefix("torch.")
    if not quantized:
        reason = getattr(module, "mixdq_reason", "not quantized")
    else:
        reason = w.quantization_repr().partition(", ")[2]
    return LayerRow(
        name=name,
        kind=kind,
        shape=list(w.shape),
        quantized=quantized,
        weight_bits=w.bits if quantized else w.element_size() * 8,
        act_bits=w.act_bits if int8 else None,
        activation=w.activation if int8 else "none",
        computes="int8" if int8 else dtype,
        kernel=ops.kernel_name(w.device, int8) if quantized else "torch",
        reason=reason,
        bytes=storage_bytes([w]),
    )


def _cells(r: LayerRow) -> tuple[str, ...]:
    shape = "x".join(map(str, r.shape))
    weight = f"int{r.weight_bits}" if r.quantized else f"{r.weight_bits}-bit float"
    act = f"int{r.act_bits} {r.activation}" if r.act_bits else "float"
    return r.name, r.kind, shape, weight, act, r.computes, r.kernel, r.reason, f"{r.bytes / 1024:.1f}"


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A plain text table, two spaces between columns; numbers in the last column right-aligned."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [c.ljust(w) for c, w in zip(row[:-1], widths[:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1].rjust(widths[-1])]).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def file_table(description: FileDescription) -> str:
    """What ``model_file.describe`` found, as text: a row for each layer, then totals and further facts."""
    rows, kind = description.rows, description.kind
    if kind == "bit plan":  # of weights or of activations: the file does not say which
        table = format_table(("layer", "bits"), [(row.name, _widths(row.bits)) for row in rows])
        return f"{table}\n{kind}: {len(rows)} layers"
    is_model = kind == "model"
    header = ("layer", "weight", "activation", "groups", *(("computes",) if is_model else ()), "reason", "KiB")
    lines = [format_table(header, [_file_cells(row, is_model) for row in rows])]
    lines.append(f"{kind}: {len(rows)} layers, {description.nbytes / MIB:.1f} MiB")
    lines += [f"{key}: {json.dumps(value)}" for key, value in description.metadata.items()]
    return "\n".join(lines)


def _file_cells(row: FileRow, is_model: bool) -> tuple[str, ...]:
    # Which kernel computes it depends on the machine that loads the file.
    computed = ("int8" if row.act_bits else "float",) if is_model else ()
    size = f"{row.nbytes / 1024:.1f}"
    return row.name, _widths(row.bits), _widths(row.act_bits), str(row.groups), *computed, row.reason, size


def _widths(bits: tuple[int, ...]) -> str:
    return ",".join(map(str, bits)) or "float"
