"""Parameters of notebook 00."""

from __future__ import annotations

from typing import ClassVar

from lib.core.parameters import NotebookParameters


class StartHere(NotebookParameters):
    """Notebook 00: what the repository is and the claims of the last run."""

    study: ClassVar[str] = "00_start_here"
