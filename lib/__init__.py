"""Helper library of the studies in notebooks/. Importing it loads nothing heavy: a notebook with a
wrong parameter stops before torch does."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository
