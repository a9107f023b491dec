"""What a long measurement has done so far, in a folder that several processes share."""

import json
import os
from pathlib import Path

from mixdq_ao.errors import CheckpointError, MixDQError
from mixdq_ao.files import naming, parse_json

ROWS = "rows-{}.jsonl"


class Notebook:
    """What is done, line by line of JSON, one file for each process; the first line holds the settings.

    A line is written at once and flushed to the disk, so that stopping at any point loses what is under way and no
    more. A last line that was cut off is dropped.
    """

    def __init__(self, folder: Path, settings: dict, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._settings = folder, settings
        self._path = folder / ROWS.format(rank)
        # What others did in an earlier run counts; what they do now does not concern this one. Before anything is
        # written: a folder of another measurement stays as it is.
        self.done = set(self.read())
        self._mend()

    def _mend(self) -> None:
        """Drop a cut-off last line of this process's file; begin it with the settings where it is new."""
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        if not whole:
            self._append({"settings": self._settings})

    def _append(self, line: dict) -> None:
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        with naming(self._path):
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                while data:  # a disk that is nearly full takes a part, and refuses the rest
                    data = data[os.write(file, data) :]
                os.fsync(file)
            finally:
                os.close(file)

    def add(self, what: str, key, value: dict) -> None:
        self._append({"what": what, "key": key, **value})

    def read(self) -> dict[tuple, dict]:
        """``(what, key)`` to the values, of all processes. Raises ``MixDQError`` for another measurement's files."""
        found = {}
        for path in sorted(self._folder.glob(ROWS.format("*"))):
            lines = path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]
            values = [parse_json(path, f"line {i}", line) for i, line in enumerate(lines, 1)]
            if not values:
                continue  # a process that is about to write its first line
            noted = all(isinstance(v, dict) and ("settings" in v or {"what", "key"} <= v.keys()) for v in values)
            if not (noted and "settings" in values[0]):
                raise CheckpointError(path, "", "must hold what a measurement has noted, line by line")
            for row in values:
                if "settings" in row:  # more than once where two calls began the file at one moment
                    self._check_settings(path, row["settings"])
                    continue
                key = (row["what"], row["key"])
                if row["what"] == "seconds":
                    row["seconds"] += found.get(key, {"seconds": 0.0})["seconds"]
                found[key] = row
        return found

    def _check_settings(self, path: Path, theirs: dict) -> None:
        different = [key for key in {*theirs, *self._settings} if theirs.get(key) != self._settings.get(key)]
        if different:
            raise MixDQError(
                f"{path}: this is a measurement with other {', '.join(sorted(different))}. Give the same arguments "
                "to go on with it, or another folder"
            )
