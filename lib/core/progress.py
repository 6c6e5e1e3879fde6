"""How far long work has come, and how long it will still take.

In a notebook that a person runs, a bar under the cell, which goes when the work is done. Anywhere else
nothing is shown, so that outputs can be compared; but lines such as "ablation sweep 12/40, 1:10 left" are
appended to the file that PROGRESS_FILE names, at most one a second. `lib.tools.run` shows the last one in a
line of its own, `ProgressLine`. Work of less than two seconds is not worth a word.
"""

from __future__ import annotations

import html
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lib.core import kernel

_FIRST, _EVERY = 2.0, 1.0  # seconds until the first word, and between two
_outermost: _Count | None = None


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Within the block, the work is counted by calling what it gives with the number of units just done.

    Work within work that is counted is part of one unit of it, and says nothing of its own.

    Args:
        what: the work in a few words.
        total: units of all of it.
    """
    global _outermost
    if _outermost is not None:
        yield _count_nothing
        return
    count = _outermost = _Count(what, total)
    try:
        yield count.add
    finally:
        _outermost = None
        count.close()


def note_cached_unit() -> None:
    """Tell that the unit of work at hand was read from the cache: it says nothing about the time left."""
    if _outermost is not None:
        _outermost.was_read = True


def clock(seconds: float) -> str:
    """Such as 1:05 or 2:00:00."""
    minutes, seconds = divmod(int(seconds), 60)
    hours = f"{minutes // 60}:{minutes % 60:02d}" if minutes >= 60 else str(minutes)
    return f"{hours}:{seconds:02d}"


class ProgressLine:
    """How far a notebook is, in a line: rewritten in place on a terminal, else a new one every few seconds.

    Args:
        study: its name.
        n_cells: all of its cells.
        work: the file that PROGRESS_FILE names in its kernel.
    """

    def __init__(self, study: str, n_cells: int, work: Path):
        self.study, self.n_cells, self.cell, self.work = study, n_cells, 0, work
        self.width = 28
        self.started = time.monotonic()
        self.shown = 0.0
        self.terminal = sys.stdout.isatty()
        self.show(0)

    def show(self, cell: int) -> None:
        """Say which cell is at work."""
        self.cell = cell
        now = time.monotonic()
        if self.terminal or now - self.shown >= 10:
            self.shown = now
            self._write(f"cell {cell} of {self.n_cells}{self._working()}", now - self.started, "")

    def close(self, word: str, seconds: float) -> None:
        place = "" if word == "done" else f" at cell {self.cell} of {self.n_cells}"
        self._write(word + place, seconds, "\n")

    def _working(self) -> str:
        """What the cell is at, such as ", ablation sweep 12/40, 1:10 left"."""
        text = self.work.read_text(encoding="utf-8") if self.work.is_file() else ""
        line = text.rpartition("\n")[0].rpartition("\n")[2]  # the last whole one
        return f", {line}" if line.endswith(" left") else ""

    def _write(self, state: str, seconds: float, end: str) -> None:
        self.width = max(self.width, len(state))  # a shorter line on a terminal covers the longer one
        line = f"{self.study:<24} {state:<{self.width}} {clock(seconds):>7}"
        print(f"\r{line}" if self.terminal else line, end=end if self.terminal else "\n", flush=True)


def _count_nothing(n: int) -> None:
    pass


class _Count:
    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.started = self.last = time.monotonic()
        self.next = self.started + _FIRST
        self.steps: deque[tuple[float, int]] = deque(maxlen=20)  # seconds and units of the last ones
        self.was_read = False
        self.place: _Bar | _Lines | None = None

    def add(self, n: int) -> None:
        now = time.monotonic()
        if not self.was_read:
            self.steps.append((now - self.last, n))
        self.done, self.last, self.was_read = self.done + n, now, False
        if now < self.next:
            return
        self.next = now + _EVERY
        self.place = self.place or _place()
        if self.place:
            self.place.show(self, f"{self._state()}{self._left()}")

    def close(self) -> None:
        if self.place:
            self.place.close(f"{self._state()} in {clock(time.monotonic() - self.started)}")

    def _state(self) -> str:
        return f"{self.what} {self.done}/{self.total}"

    def _left(self) -> str:
        units = sum(n for _, n in self.steps)
        seconds = sum(seconds for seconds, _ in self.steps)
        return f", {clock(seconds / units * (self.total - self.done))} left" if units else ""


def _place() -> _Bar | _Lines | None:
    if kernel.is_attended():
        return _Bar()
    return _Lines(os.environ["PROGRESS_FILE"]) if os.environ.get("PROGRESS_FILE") else None


class _Bar:
    """An output of the running cell, rewritten in place."""

    def __init__(self):
        self.id, self.is_there = uuid.uuid4().hex, False

    def show(self, count: _Count, text: str) -> None:
        words = html.escape(text)
        bar = f'<progress max="{count.total}" value="{count.done}" aria-label="{words}"></progress> {words}'
        self._publish({"text/html": bar, "text/plain": text})

    def close(self, text: str) -> None:
        self._publish({})  # JupyterLab shows an output without data as nothing

    def _publish(self, data: dict[str, Any]) -> None:
        from IPython import get_ipython

        publisher = get_ipython().display_pub
        update, self.is_there = self.is_there, True  # first: who interrupts once it is shown wants it gone
        publisher.publish(data, {}, transient={"display_id": self.id}, update=update)


class _Lines:
    """Lines at the end of a file."""

    def __init__(self, path: str):
        self.path = path

    def show(self, count: _Count, text: str) -> None:
        with suppress(OSError), open(self.path, "a", encoding="utf-8") as file:  # no reason to stop a study
            file.write(text + "\n")

    def close(self, text: str) -> None:
        self.show(None, text)
