"""Progress for people: a bar on a terminal once a loop has taken two seconds, a line a minute in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
DELAY_SECONDS = 2.0
LINE_SECONDS = 60.0


def track(items: Iterable[T], text: str, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Iterate over ``items``; a bar is drawn on stderr from the third second on.

    ``show`` is True (at once), False (never) or None (after two seconds; a line a minute where stderr is no terminal).
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if show is False:
        yield from items
        return
    if show is None and not sys.stderr.isatty():
        yield from _with_lines(items, text, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(text, total=total)
    # By the clock and not by the items: the first of them may take a minute.
    start = threading.Timer(DELAY_SECONDS, bar.start)
    start.daemon = True
    if show:
        bar.start()
    else:
        start.start()
    try:
        for item in items:
            yield item
            bar.advance(task)
    finally:
        if not show:
            start.cancel()
            start.join()  # it may be starting the bar just now
        if bar.live.is_started:
            bar.stop()


def _with_lines(items: Iterable[T], text: str, total: int | None) -> Iterator[T]:
    last, of = time.monotonic(), "" if total is None else f" of {total}"
    for done, item in enumerate(items):
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"{text}: {done}{of}", file=sys.stderr, flush=True)
        yield item


@contextmanager
def between(total: int, show: bool | None = None) -> Iterator[Callable[[str, int], None]]:
    """Yields ``advance(text, count)``, which draws a bar on stderr when it is called and at no other time.

    For measurements: a bar that draws itself takes the interpreter from what is measured. ``show`` is as for
    :func:`track`, but without the delay.
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        yield lambda text, count=1: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, count=1: bar.update(task, description=text, advance=count, refresh=True)
