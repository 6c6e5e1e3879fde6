"""Parameters of study 4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from lib.core.parameters import StudyParameters, Whole, Words, called_alike


class CodiAttention(StudyParameters):
    """Study 4: what latent thoughts attend to and store."""

    study: ClassVar[str] = "04_codi_attention"
    stays_here: ClassVar[str] = (
        "NDIF serves models as the hub has them, without the projection that feeds CODI's thoughts back"
    )

    model_id: str = Field("organism/codi", min_length=1)
    compare_with: Words = ["organism/codi-results", "organism/codi-seed1", "organism/codi-results-seed1"]
    answer_only: Words = ["organism/codi-answer-only", "organism/codi-answer-scratch"]
    problems: str = ""
    n_problems: Whole = Field(0, ge=0)
    n_thoughts: Whole = Field(-1, ge=-1)
    top_k: Whole = Field(5, ge=1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.n_thoughts in (0, 1):
            yield f"n_thoughts: {self.n_thoughts} has no even and odd ones to compare; take 2 or more, or -1"
        yield from called_alike([self.model_id, *self.compare_with])
