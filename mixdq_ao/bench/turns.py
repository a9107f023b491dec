"""Runs on one device take turns: they prepare and compile side by side, and each is alone while it measures."""

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # on Windows, where runs are not kept apart
    fcntl = None


class Turns:
    """A lock that all of a user's runs on a device share, whichever command started them."""

    def __init__(self, device: torch.device):
        name = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device.type
        user = os.getuid() if hasattr(os, "getuid") else ""
        self._path = Path(tempfile.gettempdir()) / f"mixdq-ao-bench-{user}-{name}.lock"

    def together(self) -> contextlib.AbstractContextManager:
        """With others, while nobody measures."""
        return self._held(exclusive=False)

    def alone(self) -> contextlib.AbstractContextManager:
        """Waits until nobody else is at work."""
        return self._held(exclusive=True)

    @contextlib.contextmanager
    def _held(self, exclusive: bool) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(file)


@contextlib.contextmanager
def within(seconds: float | None, what: str) -> Iterator[None]:
    """Raises ``TimeoutError`` in a block that takes longer; only in the main thread, and not on Windows."""
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"not {what} within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
