"""The notebook's kernel: whether a person runs it, short errors of traces, and code edited under it."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

from lib import ROOT


def is_running() -> bool:
    """Whether this process is the kernel of a notebook."""
    return hasattr(_shell(), "kernel")


def is_attended() -> bool:
    """Whether the running cell was started by a person: JupyterLab and its like offer the kernel to ask them
    for input, papermill, nbclient and nbval do not."""
    kernel = getattr(_shell(), "kernel", None)
    parent = kernel.get_parent() if kernel else None
    return bool(parent and parent.get("content", {}).get("allow_stdin"))


def cells_from_here() -> list[str]:
    """Sources of the running cell and, as they come to run, of those after it; empty outside a notebook.

    IPython's own list, `In`, would not do: nbval keeps its cells out of the history.
    """
    shell = _shell()
    if not is_running():
        return []
    request = shell.kernel.get_parent()["content"]
    cells = [request["code"]]

    def add(info: Any) -> None:
        if info.store_history == request["store_history"]:  # else a tool asks the kernel, not a cell
            cells.append(info.raw_cell)

    shell.events.register("pre_run_cell", add)
    return cells


class PlainError(Exception):
    """An error that the user mends, not the programmer: a notebook shows its message in place of the
    traceback, under which it would drown."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


# -- errors in traces ------------------------------------------------------------------------------


def shorten_trace_errors() -> None:
    """Show errors of a trace, and interrupts in it, by the lines of the notebook and of lib alone.

    nnsight runs a block within the model's forward, so that a whole traceback has some 140 lines of torch,
    transformers and nnsight. `%tb` in the next cell shows all of it. Other errors stay as they are.
    """
    shell = _shell()
    if shell is not None and not shell.custom_exceptions:  # a person's own handler stays
        shell.set_custom_exc((Exception, KeyboardInterrupt), _show_error)


def _show_error(
    shell: Any, kind: type, error: BaseException, traceback: types.TracebackType, tb_offset: int | None = None
) -> None:
    frames = _frames(traceback)
    own = _own_frames(frames)
    if not own or not any(map(_is_nnsight, frames)):
        # Without a line of the notebook the cell did not run: its syntax is wrong.
        shell.showtraceback((kind, error, traceback), running_compiled_code=bool(own))
        return
    if (
        frames[-1] is not own[-1]
        and not hasattr(error, "__intervention_tb__")
        and not _is_nnsight(frames[-1])
    ):
        own.append(frames[-1])  # the model itself stumbled, over what a block gave it
    cut = None
    for frame in reversed(own):
        cut = types.TracebackType(cut, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    context = 3 if len(own) <= 3 else 2
    lines = shell.InteractiveTB.structured_traceback(kind, error, cut, tb_offset=0, context=context)
    if is_attended():
        lines.append("(lines of the notebook and of lib; %tb shows all)")
    shell._showtraceback(kind, error, lines)
    sys.last_type, sys.last_value, sys.last_traceback = kind, error, traceback  # what %tb shows


def _frames(traceback: types.TracebackType | None) -> list[types.TracebackType]:
    found = []
    while traceback is not None:
        found.append(traceback)
        traceback = traceback.tb_next
    return found


def _own_frames(frames: list[types.TracebackType]) -> list[types.TracebackType]:
    """Frames of the notebook and of lib, without the head of a block where a line of the block follows."""
    own = [i for i, frame in enumerate(frames) if not _is_foreign(frame)]
    heads = {i for i in own if i + 1 < len(frames) and _is_nnsight(frames[i + 1])}
    files = [_file(frame) for frame in frames]
    return [frames[i] for i in own if not (i in heads and files[i] in files[i + 1 :])]


def _is_nnsight(frame: types.TracebackType) -> bool:
    return _package_parts(frame)[:1] == ("nnsight",)


def _file(frame: types.TracebackType) -> str:
    return frame.tb_frame.f_code.co_filename


def _is_foreign(frame: types.TracebackType) -> bool:
    """Whether a frame is of an installed package or of Python itself."""
    return bool(_package_parts(frame)) or _file(frame).startswith(("<frozen", sysconfig.get_path("stdlib")))


def _package_parts(frame: types.TracebackType) -> tuple[str, ...]:
    """The path of a frame's file within site-packages; () when it is elsewhere."""
    parts = Path(_file(frame)).parts
    places = [i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    return parts[places[-1] + 1 :] if places else ()


# -- edited code -----------------------------------------------------------------------------------


def refuse_edited() -> None:
    """Stop a notebook whose kernel runs older code of lib than its files hold.

    Raises:
        PlainError: a file of lib was edited since it was imported.
    """
    now = _sources() if _shell() is not None else _IMPORTED
    if edited := sorted(name for name in _IMPORTED | now if _IMPORTED.get(name) != now.get(name)):
        raise PlainError(f"{', '.join(edited)} was edited: restart the kernel")


def _sources() -> dict[str, str]:
    """Hash of every file of lib, by its path in the repository."""
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "lib").rglob("*.py")}
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _shell() -> Any:
    """IPython's shell, if this process is one."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


_IMPORTED = _sources()
