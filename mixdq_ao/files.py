"""Files on disk: whole or not at all when written, never trusted when read.

A safetensors file is an 8-byte header length, a JSON header and one flat buffer. Both directions are written out here:
reading checks every rule of the format before a byte is allocated, also those that a JSON parser hides (a key that is
there twice); writing takes one tensor at a time, so that saving a model needs no second copy of it.
"""

import json
import math
import os
import pickle
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixdq_ao.errors import CheckpointError, MixDQError

MAX_TEXT_BYTES = 16 * 2**20  # plans, name lists and headers; real ones are under 2 MiB
MAX_DIMENSIONS = 8
METADATA_KEY = "__metadata__"
ABANDONED_SECONDS = 3600  # a temporary file that nobody has written to for so long has lost its writer
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def replacing(path):
    """Yields a binary file open for writing that takes the place of ``path`` if, and only if, the block succeeds.

    The bytes go to a temporary file in the same folder, are flushed to the disk and renamed over ``path`` in one step.
    An ``OSError``, such as that of a full disk, names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
    with naming(path, temporary):
        _drop_leftovers(path)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what matters
                temporary.unlink()
            raise


@contextmanager
def naming(path, temporary=None):
    """An ``OSError`` of the block that names no file, such as that of a full disk, or ``temporary``, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _drop_leftovers(path: Path) -> None:
    """Remove temporary files of ``path`` that a killed process left behind: one of a model holds gigabytes."""
    mine = re.compile(rf"\.{re.escape(path.name[:64])}\.[0-9a-f]{{16}}\.tmp")
    for entry in os.scandir(path.parent):
        if mine.fullmatch(entry.name):
            with suppress(FileNotFoundError):  # its writer was alive after all, or another process removes it, too
                if time.time() - entry.stat().st_mtime > ABANDONED_SECONDS:
                    os.unlink(entry)


def write_text(path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def writable_file(path) -> Path:
    """``path`` as a ``Path``, its folder made: to be asked before work that would be lost. Raises ``MixDQError``."""
    path = Path(path)
    if path.is_dir():
        raise MixDQError(f"{path}: cannot be written, for it is a folder; name a file in it")
    if path.exists() and not path.is_file():  # a device or a pipe: the new file would take its place
        raise MixDQError(f"{path}: cannot be replaced, for it is no regular file; name another")
    writable_folder(path.parent)
    return path


def writable_folder(path) -> Path:
    """``path`` as a ``Path``, made where it is missing. Raises ``MixDQError`` where nothing can be written to it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MixDQError(f"{path}: cannot be a folder ({error.strerror}); give another") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise MixDQError(f"{path}: no permission to write to this folder; give another")
    return path


def regular_file(path) -> Path:
    """``path`` as a ``Path``. Raises ``CheckpointError`` where it is not one file that can be read."""
    path = Path(path)
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(path, "", "a symlink must point to a file", f"the missing {os.readlink(path)}")
        raise CheckpointError(path, "", "the file must exist", advice="Check the path.")
    if path.is_dir():
        raise CheckpointError(path, "", "must be a file", "a folder", "Name one file in it.")
    if not path.is_file():
        raise CheckpointError(path, "", "must be a regular file")
    if path.name.endswith(".index.json"):
        raise CheckpointError(
            path, "", "must be one file", "the index of a sharded model", "Save the model as one safetensors file."
        )
    return path


@contextmanager
def reading(path):
    """Yields ``path`` open for reading in binary; an ``OSError`` becomes a ``CheckpointError``."""
    path = regular_file(path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(path, "", "must be readable", str(error)) from error


def read_text(path) -> str:
    """The text of a UTF-8 file of at most ``MAX_TEXT_BYTES``. Raises ``CheckpointError``."""
    with reading(path) as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise CheckpointError(path, "", f"must be at most {MAX_TEXT_BYTES} bytes", f"{os.path.getsize(path)} bytes")
    return _decode(path, "", data)


def _decode(path, key: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(path, key, "must be UTF-8 text", str(error)) from error


class _DuplicateKey(Exception):
    pass


def _unique(pairs) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return result


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def parse_json(path, key: str, text: str):
    """JSON without duplicate keys, NaN or infinities. Raises ``CheckpointError`` naming ``path`` and ``key``."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _DuplicateKey as error:
        raise CheckpointError(path, str(error), "a key must be there once", "it twice") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, key, "must be JSON", str(error)) from error


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype, shape and the range of its bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorFile:
    """A safetensors file whose header has been checked.

    Attributes: ``path``; ``metadata`` (``dict[str, str]``); ``entries`` (name -> ``Entry``). ``read(name)`` gives one
    tensor in memory of its own. The constructor raises ``CheckpointError`` for every rule that the file breaks and
    allocates nothing larger than the header.
    """

    def __init__(self, path):
        self.path = Path(path)
        with reading(path) as file:
            header, start, size = self._read_header(file)
        self.metadata = self._checked_metadata(header.pop(METADATA_KEY, {}))
        self.entries = {name: self._entry(name, spec, start, size) for name, spec in header.items()}
        self._check_cover(start, size)

    def fail(self, key: str, rule: str, found: str = "", advice: str = ""):
        """Raises the ``CheckpointError`` of this file."""
        raise CheckpointError(self.path, key, rule, found, advice)

    def _read_header(self, file) -> tuple[dict, int, int]:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            self.fail("", "must be a safetensors file of at least 8 bytes", f"{size} bytes")
        length = int.from_bytes(prefix, "little")
        if length > MAX_TEXT_BYTES:
            self.fail(
                "", f"the header must be at most {MAX_TEXT_BYTES} bytes", f"{length}", "Is it a safetensors file?"
            )
        if 8 + length > size:
            self.fail("", "the header must lie inside the file", f"a header of {length} bytes in a file of {size}")
        header = parse_json(self.path, "header", _decode(self.path, "header", file.read(length)))
        if not isinstance(header, dict):
            self.fail("header", "must be a JSON object", type(header).__name__)
        return header, 8 + length, size

    def _checked_metadata(self, metadata) -> dict[str, str]:
        if not isinstance(metadata, dict):
            self.fail(METADATA_KEY, "must be a JSON object", type(metadata).__name__)
        for key, value in metadata.items():
            if not isinstance(value, str):
                self.fail(f"{METADATA_KEY}.{key}", "must be a string", type(value).__name__)
        return metadata

    def _entry(self, name: str, spec, start: int, size: int) -> Entry:
        if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "data_offsets"}:
            self.fail(name, "must have exactly dtype, shape and data_offsets")
        if not isinstance(spec["dtype"], str) or spec["dtype"] not in DTYPES:
            self.fail(name, f"dtype must be one of {', '.join(DTYPES)}", repr(spec["dtype"]))
        shape, offsets = spec["shape"], spec["data_offsets"]
        if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= 2**62:
            self.fail(name, f"shape must be up to {MAX_DIMENSIONS} sizes", str(shape)[:80])
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self.fail(name, "data_offsets must be a begin and an end", str(offsets)[:80])
        dtype = DTYPES[spec["dtype"]]
        begin, end = start + offsets[0], start + offsets[1]
        if end > size:
            self.fail(name, "data must lie inside the file", f"bytes up to {end} of {size}", "Is the file truncated?")
        if end - begin != math.prod(shape) * dtype.itemsize:
            self.fail(name, "data_offsets must fit dtype and shape", f"{end - begin} bytes for {spec['dtype']} {shape}")
        return Entry(dtype, tuple(shape), begin, end)

    def _check_cover(self, start: int, size: int) -> None:
        position = start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin < position:
                self.fail(name, "data must not overlap another tensor", f"offset {entry.begin - start}")
            if entry.begin > position:
                self.fail(name, "data must follow the previous tensor without a hole", f"offset {entry.begin - start}")
            position = entry.end
        if position != size:
            self.fail("", "the file must end with its last tensor", f"{size - position} bytes more")

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, contiguous, on the CPU. Raises ``CheckpointError`` if the file has shrunk since."""
        entry = self.entries[name]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        with reading(self.path) as file:
            file.seek(entry.begin)
            if file.readinto(raw.numpy()) != entry.nbytes:
                self.fail(name, "data must lie inside the file", "a file that changed while it was read")
        return raw.view(entry.dtype).view(entry.shape)


def _are_counts(values) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def write_tensors(path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all, one tensor at a time.

    ``tensors`` may be of any layout and device; they are stored contiguous. Raises ``TypeError`` for a dtype that the
    format table lacks.
    """
    # Wide dtypes first keeps every tensor aligned to its own size, as the format's own writer does.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, position = {METADATA_KEY: dict(metadata)}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"'{name}': dtype must be one of {', '.join(DTYPES)}; found {tensor.dtype}")
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, contiguous; a copy only where the layout or the device needs one."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def is_pickle(path) -> bool:
    """Whether the content of ``path`` is a pickle or the zip archive that ``torch.save`` writes."""
    with reading(path) as file:
        head = file.read(9)
    # A safetensors file may start with the same two bytes (a header of 0x280 bytes), but then zeros follow.
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and any(head[3:8]))


def load_pickle(path):
    """The content of a file written by ``torch.save``, through ``weights_only=True`` and nothing else.

    Raises ``CheckpointError`` for whatever goes wrong: a global that is not allowed (its code does not run), a broken
    or compressed archive.
    """
    with reading(path) as file:
        try:
            _refuse_compressed(path)
            return torch.load(file, weights_only=True, map_location="cpu")  # given the path, it goes by its suffix
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))  # torch's own advice is to load the file unsafely
            rule = "a pickle may hold only tensors, dicts, lists, strings and numbers"
            raise CheckpointError(path, "", rule, found[1] if found else "something else", "It was not run.") from error
        except Exception as error:  # the unpickler meets hostile bytes here and raises almost anything
            raise CheckpointError(path, "", "must be a file written by torch.save", first_line(error)) from error


def first_line(error: Exception) -> str:
    """What another library's error says, short enough for a message of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _refuse_compressed(path: Path) -> None:
    """``torch.save`` stores without compression; a compressed member could grow a thousand times when read."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise CheckpointError(path, member.filename, "a member of the archive must be stored uncompressed")


def check_exact_keys(
    fail: Callable[..., None], what: str, found: Iterable[str], required: Iterable[str], optional: Iterable[str] = ()
) -> None:
    """Calls ``fail(key, rule)`` for the first key that is missing or unknown; ``what`` names the place in the rule."""
    found, required = set(found), set(required)
    for key in sorted(required - found):
        fail(key, f"{what} must have this key", "none")
    for key in sorted(found - required - set(optional)):
        fail(key, f"unknown key in {what}")
