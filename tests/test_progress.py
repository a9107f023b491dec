"""Progress bars: every item comes through, and the bar keeps quiet where it should."""

import sys
import threading
import time

import pytest

from mixdq_ao import progress
from mixdq_ao.progress import between, track


@pytest.mark.parametrize("show", [True, False, None], ids=["always", "never", "after two seconds on a terminal"])
def test_every_item_comes_through(show):
    assert list(track(iter(range(5)), "Counting", 5, show)) == list(range(5))


@pytest.mark.parametrize("show", [False, None])
def test_nothing_is_printed_off_a_terminal(show, capfd):
    list(track(range(3), "Counting", show=show))
    assert capfd.readouterr() == ("", "")


def test_a_log_gets_lines_now_and_then(capfd, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    for _ in track(range(3), "Counting"):
        time.sleep(0.06)
    assert capfd.readouterr() == ("", "Counting: 1 of 3\nCounting: 2 of 3\n")


def test_bar_goes_to_stderr(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take the captured stream for a terminal
    list(track(range(3), "Counting", show=True))
    out, err = capfd.readouterr()
    assert out == "" and "Counting" in err and "3/3" in err


def test_the_bar_appears_while_the_first_item_is_under_way(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = []

    def items():
        deadline = time.monotonic() + 10
        while not shown and time.monotonic() < deadline:
            time.sleep(0.05)
            shown.extend(["Counting"] if "Counting" in capfd.readouterr().err else [])
        yield 1

    assert list(track(items(), "Counting", 1)) == [1] and shown


def test_a_short_loop_shows_nothing(capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(track(range(3), "Counting")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "") and not any(isinstance(t, threading.Timer) for t in threading.enumerate())


def test_a_bar_between_measurements(capfd, monkeypatch):
    with between(3) as advance:
        advance("Measuring", 1)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with between(3, show=True) as advance:
        advance("Measuring w8a8", 1)
    assert "Measuring w8a8" in capfd.readouterr().err
