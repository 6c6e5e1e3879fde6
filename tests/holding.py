"""Work that stops at a given place, to be killed there, however fast or busy the machine is."""

from __future__ import annotations

import os
import time
from pathlib import Path

HOUR = 3600  # s; nobody waits for it


def hold(model, folder: Path, entries: int | None) -> list[int]:
    """Hold a model's next forward once a cache's folder has so many entries.

    Args:
        model: from `lib.core.models.load`.
        folder: of the cache.
        entries: None never holds.

    Returns:
        A list that grows by one item a forward.
    """
    forwards = []

    def before_forward(*_) -> None:
        forwards.append(1)
        if entries is not None and len(list(folder.glob("[!.]*.npz"))) >= entries:
            time.sleep(HOUR)

    model._module.register_forward_pre_hook(before_forward)
    return forwards


SITE = """import fnmatch, os, pathlib, time
replace = os.replace
def hold(source, target, **options):
    replace(source, target, **options)
    target = pathlib.Path(target)
    if fnmatch.fnmatch(target.name, {pattern!r}) and len(list(target.parent.glob({pattern!r}))) >= {entries}:
        time.sleep({seconds})
os.replace = hold
"""


def holding(folder: Path, pattern: str, entries: int) -> dict[str, str]:
    """Environment of a process that holds once it, or a child, has written so many files of a pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE.format(pattern=pattern, entries=entries, seconds=HOUR))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
