"""What long work says of itself: in a notebook that a person runs, in `lib.tools.run`, and nowhere else."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel

from lib.core import progress
from lib.core.batches import Batches
from lib.core.cache import Cache
from lib.core.progress import ProgressLine, clock, counting


class Clock:
    """Time that goes by when told."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time_goes(monkeypatch) -> Clock:
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Names a file for progress; returns what was written to it."""
    path = tmp_path / "progress"
    monkeypatch.setenv("PROGRESS_FILE", str(path))
    return lambda: path.read_text().splitlines() if path.exists() else []


def test_lines_come_after_two_seconds_and_then_one_a_second(time_goes, lines):
    with counting("ablation sweep", 40) as count:
        for _ in range(10):
            time_goes.now += 0.4
            count(4)
    assert lines() == [
        "ablation sweep 20/40, 0:02 left", "ablation sweep 32/40, 0:00 left", "ablation sweep 40/40 in 0:04"
    ]  # fmt: skip


def test_time_left_does_not_count_on_what_was_read_from_the_cache(time_goes, lines, tmp_path):
    def compute():
        time_goes.now += 5
        return {"a": np.zeros(1)}

    cache = Cache(tmp_path / "cache")
    for i in range(6):
        cache.get("unit", {"code": 1, "i": i}, compute)
    with counting("units", 10) as count:
        for i in range(10):
            cache.get("unit", {"code": 1, "i": i}, compute)
            count(1)
    assert lines()[0] == "units 7/10, 0:15 left" and lines()[-1] == "units 10/10 in 0:20"


def test_time_left_follows_the_last_units(time_goes, lines):
    with counting("units", 100) as count:
        for i in range(60):
            time_goes.now += 1 if i < 30 else 3
            count(1)
    assert "units 60/100, 2:00 left" in lines()


def test_work_within_counted_work_is_silent_and_work_after_an_error_is_not(time_goes, lines):
    def fails(rows):
        time_goes.now += 10
        if rows[0] == 2:
            raise ValueError("no")
        return rows

    with counting("outer", 2), pytest.raises(ValueError):
        for done in range(2):
            list(Batches(1).map(fails, range(done, 3)))
    assert lines() == []
    with pytest.raises(ValueError):
        list(Batches(1).map(fails, range(4)))
    assert lines()[-1] == "batches 2/4 in 0:30"


def test_file_that_can_not_be_written_stops_nothing(time_goes, monkeypatch, tmp_path):
    monkeypatch.setenv("PROGRESS_FILE", str(tmp_path / "no" / "folder"))
    with counting("work", 1) as count:
        time_goes.now += 9
        count(1)


def test_clock():
    assert [clock(seconds) for seconds in (0, 65.9, 3600, 90061)] == ["0:00", "1:05", "1:00:00", "25:01:01"]


# -- in a kernel -----------------------------------------------------------------------------------

WORK = """
import time
from lib.core.batches import Batches
print("before")
found = list(Batches(1).map(lambda rows: time.sleep(0.3), range(9)))
print("after", len(found))
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    lines = tmp_path_factory.mktemp("kernel") / "progress"
    manager, client = start_new_kernel(env=os.environ | {"PROGRESS_FILE": str(lines), "OMP_NUM_THREADS": "1"})
    client.progress_file, client.manager = lines, manager
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def outputs(client, code: str, attended: bool, during=None) -> list[tuple[str, dict]]:
    """Messages of a cell's outputs, in order."""
    found = []

    def collect(message) -> None:
        if message["msg_type"] not in ("status", "execute_input"):
            found.append((message["msg_type"], message["content"]))
            if during:
                during(message)

    client.execute_interactive(code, allow_stdin=attended, output_hook=collect, timeout=600)
    return found


def printed(messages) -> str:
    return "".join(content["text"] for kind, content in messages if kind == "stream")


def test_cell_of_a_person_shows_a_bar_that_goes(kernel):
    messages = outputs(kernel, WORK, attended=True)
    assert printed(messages) == "before\nafter 9\n" and not kernel.progress_file.exists()
    shown = [(kind, content) for kind, content in messages if kind != "stream"]
    assert [kind for kind, _ in shown] == ["display_data"] + ["update_display_data"] * (len(shown) - 1)
    assert len({content["transient"]["display_id"] for _, content in shown}) == 1
    assert re.fullmatch(r"batches [1-8]/9, \d+:\d\d left", shown[0][1]["data"]["text/plain"])
    bar = r'<progress max="9" value="[1-8]" aria-label="(batches ./9, \d+:\d\d left)"></progress> \1'
    assert re.fullmatch(bar, shown[0][1]["data"]["text/html"])
    assert len(shown) >= 2 and shown[-1][1]["data"] == {}


def test_cell_of_papermill_or_nbval_shows_what_it_prints_and_tells_the_file(kernel):
    messages = outputs(kernel, WORK, attended=False)
    assert [kind for kind, _ in messages] == ["stream"] * len(messages)
    assert printed(messages) == "before\nafter 9\n"
    told = kernel.progress_file.read_text().splitlines()
    kernel.progress_file.unlink()
    assert re.fullmatch(r"batches [1-8]/9, \d+:\d\d left", told[0])
    assert re.fullmatch(r"batches 9/9 in \d+:\d\d", told[-1])


def test_bar_of_an_interrupted_cell_goes(kernel):
    def interrupt(message) -> None:
        if message["msg_type"] == "display_data":
            kernel.manager.interrupt_kernel()

    messages = outputs(kernel, WORK, attended=True, during=interrupt)
    assert messages[-1][0] == "error" and messages[-1][1]["ename"] == "KeyboardInterrupt"
    assert messages[-2][0] == "update_display_data" and messages[-2][1]["data"] == {}


# -- in lib.tools.run ------------------------------------------------------------------------------------


def test_run_shows_the_work_of_the_cell_in_its_line(tmp_path, capsys):
    line = ProgressLine("01_induction_ablation", 4, tmp_path / "work")
    line.terminal = True
    (tmp_path / "work").write_text("sweep 1/9, 0:04 left\nsweep 2/9, 0:03 left\nsweep 3")
    line.show(3)
    line.close("done", 65)
    shown, ended = capsys.readouterr().out.split("\r")[1:]
    assert "cell 3 of 4, sweep 2/9, 0:03 left " in shown
    assert ended.startswith("01_induction_ablation    done  ") and ended.endswith(" 1:05\n")
    assert len(shown) == len(ended.rstrip("\n")), "what was longer shows behind the line"
