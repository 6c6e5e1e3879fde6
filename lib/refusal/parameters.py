"""Parameters of study 3 and of its appendices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from lib.core.parameters import (
    REAL,
    Dtype,
    Reals,
    StudyParameters,
    Whole,
    Wholes,
    Words,
    called_alike,
    not_on_hub,
)

API_MODEL = "deepseek-v4-flash"  # what judge_model is where it is empty


class RefusalLowRank(StudyParameters):
    """Study 3: how many directions carry refusal in a chat model."""

    study: ClassVar[str] = "03_refusal_low_rank"
    embedded: ClassVar[dict[str, Any]] = {"model_id": "organism/refusal-lowrank", "n_prompts": 56}

    model_id: str = Field(REAL, min_length=1)
    dtype: Dtype = "auto"
    prompts: str = ""
    requests: str = ""
    n_prompts: Whole = Field(0, ge=0)
    judge: Literal["auto", "phrases", "openai", "rule"] = "auto"
    judge_url: str = ""
    judge_model: str = ""
    max_new_tokens: Whole = Field(24, ge=1)
    k_values: Wholes = [1, 2, 3, 4, 5]
    strengths: Reals = [0.25, 0.5, 0.75, 1.0, 1.5]
    n_random: Whole = Field(3, ge=1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)

    @property
    def grader(self) -> str:
        """The kind of judge: by itself the exact one for an embedded model, phrases for any other."""
        if self.judge != "auto":
            return self.judge
        return "rule" if self.model_id.startswith("organism/") else "phrases"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        embedded = self.model_id.startswith("organism/")
        if self.judge == "rule" and not (embedded or self.prompts):
            yield "judge: 'rule' grades the language of the embedded models; take 'phrases' or 'openai'"
        if embedded and self.judge not in ("auto", "rule"):
            yield f"judge: {self.judge!r}, but an embedded model's answers are graded by 'rule'; leave it out"
        if embedded and self.requests:
            yield "requests: an embedded model reads no English; leave it empty, or name another model_id"
        if (self.judge_url or self.judge_model) and self.judge != "openai":
            yield f"judge: {self.judge!r}, but judge_url or judge_model is given; set judge to 'openai'"
        if 0 < self.n_prompts < 8:
            yield f"n_prompts: {self.n_prompts}; at least 8 are needed, 0 is all"


class RefusalByGradient(StudyParameters):
    """Appendix 3b: directions that gradient descent finds, beside the difference of means."""

    study: ClassVar[str] = "3b_refusal_by_gradient"
    appendix: ClassVar[bool] = True
    embedded: ClassVar[dict[str, Any]] = {"model_id": "organism/refusal-single", "n_prompts": 56}

    model_id: str = Field(REAL, min_length=1)
    dtype: Dtype = "auto"
    prompts: str = ""
    n_prompts: Whole = Field(0, ge=0)
    max_new_tokens: Whole = Field(24, ge=1)
    n_steps: Whole = Field(24, ge=4)
    n_starts: Whole = Field(2, ge=1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.remote:
            yield "remote: gradients do not come back from NDIF; leave it out"
        if 0 < self.n_prompts < 8:
            yield f"n_prompts: {self.n_prompts}; at least 8 are needed, 0 is all"


class RefusalInstrument(StudyParameters):
    """Appendix 3a: the instrument of study 3 on models whose refusal is known, in detail."""

    study: ClassVar[str] = "3a_refusal_instrument"
    appendix: ClassVar[bool] = True

    model_id: str = Field("organism/refusal-lowrank", min_length=1)
    compare_with: Words = [
        "organism/refusal-single",
        "organism/refusal-planted-1",
        "organism/refusal-planted-2",
        "organism/refusal-planted-3",
        "organism/refusal-decoy",
    ]
    prompts: str = ""
    n_prompts: Whole = Field(0, ge=0)
    judge: Literal["rule", "phrases", "openai"] = "rule"
    second_judge: Literal["phrases", "openai"] = "phrases"
    judge_url: str = ""
    judge_model: str = ""
    second_judge_model: str = ""
    max_new_tokens: Whole = Field(12, ge=1)
    k_values: Wholes = [1, 2, 3, 4, 5]
    strengths: Reals = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
    n_random: Whole = Field(2, ge=1)
    n_draws: Whole = Field(80, ge=2)
    optimise_steps: Whole = Field(80, ge=0)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.judge == "rule" and not (self.model_id.startswith("organism/") or self.prompts):
            yield "judge: 'rule' grades the request language of the organisms; take 'openai' or 'phrases'"
        if self.judge != "rule" and self.model_id.startswith("organism/"):
            yield f"judge: {self.judge!r}, but an organism's answers are graded by 'rule'; take second_judge"
        asked = "openai" in (self.judge, self.second_judge)
        if (self.judge_url or self.judge_model) and not asked:
            yield f"judge: {self.judge!r}, but judge_url or judge_model is given; set judge to 'openai'"
        if self.second_judge_model and self.second_judge != "openai":
            yield "second_judge: 'phrases', but second_judge_model is given; set second_judge to 'openai'"
        named = {(model.strip() or API_MODEL) for model in (self.judge_model, self.second_judge_model)}
        if self.judge == self.second_judge == "openai" and len(named) == 1:  # of one judge_url
            yield "second_judge_model: the same as judge_model; a judge agrees with itself, name another one"
        yield from called_alike([self.model_id, *self.compare_with], drop="refusal-")
        if self.remote and (here := [name for name in self.compare_with if not_on_hub(name)]):
            yield f"compare_with: remote, and NDIF serves models of the hub; leave out {', '.join(here)}"
        if 0 < self.n_prompts < 4:
            yield f"n_prompts: {self.n_prompts}; at least 4 are needed, 0 is all"
