"""Parameters of the studies: one schema a study, checked before anything heavy is loaded.

papermill passes parameters on as they come: it only warns about a name that the notebook does not
have, `-p k_values "[1,2]"` stays a string, and `-y` reads 1e-4 as one. `check` reads such values as
they were meant, or stops with one line for every problem.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lib.kernel import PlainError

if TYPE_CHECKING:
    from lib.walks import Graph

REAL = "Qwen2.5-Coder-0.5B-Instruct"  # of data/models.yaml: the pretrained model of studies 1 and 2
API_MODEL = "deepseek-v4-flash"  # what judge_model is where it is empty
# Park-25 (arXiv 2501.00070), row by row.
GRID_WORDS = tuple(
    "apple bird car egg house milk plane opera box sand sun mango rock math code phone".split()
)

Schema = TypeVar("Schema", bound="NotebookParameters")


class ParameterError(PlainError, ValueError):
    """Parameters are wrong; the message has one line for each problem."""


def check(schema: type[Schema], namespace: Mapping[str, Any]) -> Schema:
    """Read a study's parameters from the variables of its notebook.

    Names are looked for in the notebook's parameters cell and in the cell that papermill injects
    after it (the newest of each that ran), so that the setup cell can be rerun at any time.

    Args:
        schema: the study's schema.
        namespace: `globals()` of the notebook; a parameter it lacks has its default.

    Returns:
        The parameters, frozen.

    Raises:
        ParameterError: a name that is no parameter, with the nearest one; a value of the wrong type,
            out of range, or at odds with another parameter.
    """
    names = schema.model_fields
    problems = [
        f"{name}: {_no_such_parameter(name, names)}"
        for name in dict.fromkeys(_names_given(namespace.get("In", ()), names))
        if name not in names
    ]
    try:
        parameters = schema.model_validate({name: namespace[name] for name in names if name in namespace})
    except ValidationError as error:
        for detail in error.errors():
            problems += _describe(detail, schema)
    if problems:
        raise ParameterError("\n".join(problems))
    return parameters


def schemas() -> dict[str, type[NotebookParameters]]:
    """Every study's schema by the name of the study."""
    found, classes = {}, [NotebookParameters]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        if "study" in vars(cls):
            found[cls.study] = cls
    return dict(sorted(found.items()))


def _number(value: Any) -> Any:
    """A numeric string as its number; what is none is left for pydantic to refuse."""
    if isinstance(value, bool):
        raise ValueError("a number is needed")  # pydantic would read True as 1
    if isinstance(value, str):
        for read in (int, float):
            try:
                return read(value)
            except ValueError:
                pass
    return value


def _list(value: Any) -> Any:
    """A list written as JSON or Python as that list; what is none is left for pydantic to refuse."""
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value)
            except (ValueError, SyntaxError):
                pass
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Wholes = Annotated[list[Annotated[Whole, Field(ge=1)]], BeforeValidator(_list), Field(min_length=1)]
Reals = Annotated[list[Annotated[Real, Field(gt=0)]], BeforeValidator(_list), Field(min_length=1)]
Words = Annotated[list[str], BeforeValidator(_list)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class NotebookParameters(BaseModel):
    """What every notebook takes."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),  # model_id is a name
    )
    study: ClassVar[str]
    appendix: ClassVar[bool] = False  # a second reading: runs when asked for, in tests and to be stored
    embedded: ClassVar[dict[str, Any]] = {}  # what `make run` passes, so that nothing has to be fetched

    out_dir: str = ""
    use_cache: bool = True

    def faults(self) -> Iterator[str]:
        """What is wrong between parameters that are each right: one line each, opening with a name."""
        yield from ()

    @model_validator(mode="after")
    def _consistent(self) -> NotebookParameters:
        if problems := list(self.faults()):
            raise ValueError("\n".join(problems))
        return self


class StudyParameters(NotebookParameters):
    """What every study takes besides."""

    model_id: str = Field("organism/induction", min_length=1)
    revision: str = ""
    device: str = Field("cpu", min_length=1)
    dtype: Dtype = "float32"
    remote: bool = False
    seed: Whole = Field(0, ge=0, lt=2**32)

    stays_here: ClassVar[str] = ""  # why a study cannot run on NDIF

    def faults(self) -> Iterator[str]:
        if not self.remote:
            return
        if self.stays_here:
            yield f"remote: this study does not run on NDIF: {self.stays_here}; leave it false"
        elif reason := why_not_remote(self.model_id):
            yield f"remote: {reason}"
        if self.device != "cpu":
            yield f"device: {self.device!r}, but remote runs on NDIF's; leave it out"


class _GraphParameters(NotebookParameters):
    """A study on a graph."""

    graph: Literal["grid", "ring", "hexagonal", "edges"] = "grid"
    rows: Whole = Field(4, ge=1)
    cols: Whole = Field(4, ge=1)
    edges: Words = []

    def word_graph(self) -> Graph:
        """The graph that these parameters describe, without words."""
        from lib import walks  # networkx: only when there is a graph to build

        if self.graph == "grid":
            return walks.grid_graph(self.rows, self.cols)
        if self.graph == "hexagonal":
            return walks.hexagonal_graph(self.rows, self.cols)
        if self.graph == "ring":
            return walks.ring_graph(self.rows * self.cols)
        return walks.graph_from_edges(self.edges)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.edges and self.graph != "edges":
            yield f"edges: given, but graph is {self.graph!r}; set graph to 'edges', or edges to []"
            return
        try:
            self.word_graph()
        except ValueError as error:
            yield f"{'edges' if self.graph == 'edges' else 'graph'}: {error}"


class StartHere(NotebookParameters):
    """Notebook 00: what the repository is and the claims of the last run."""

    study: ClassVar[str] = "00_start_here"


class _WordGraphParameters(_GraphParameters, StudyParameters):
    """A study of a model that reads walks on a graph of words."""

    model_id: str = Field(REAL, min_length=1)
    dtype: Dtype = "auto"
    bos: str = Field("auto", min_length=1)
    words: Words = list(GRID_WORDS)

    def word_graph(self) -> Graph:
        from lib import walks  # networkx: only when there is a graph to build

        if self.graph == "grid":
            return walks.grid_graph(self.rows, self.cols, self.words)
        if self.graph == "hexagonal":
            return walks.hexagonal_graph(self.rows, self.cols, self.words)
        if self.graph == "ring":
            return walks.ring_graph(len(self.words), self.words)
        named = {word.strip() for edge in self.edges for word in edge.split("-")}
        nodes = [word for word in self.words if word in named] if named <= set(self.words) else self.words
        return walks.graph_from_edges(self.edges, nodes)

    def faults(self) -> Iterator[str]:
        if repeated := [word for word, n in Counter(self.words).items() if n > 1]:
            yield f"words: each may stand once; repeated: {' '.join(repeated)}"
        else:
            yield from super().faults()
        most = self.seq_len - self.seq_len // 5  # accuracy's rise is measured from the second tenth on
        if self.window > most:
            yield f"window: {self.window} tokens of seq_len = {self.seq_len}; at most {most} leave a start"


class InductionAblation(_WordGraphParameters):
    """Study 1: which heads carry the in-context grid, and whether the model uses it."""

    study: ClassVar[str] = "01_induction_ablation"
    embedded: ClassVar[dict[str, Any]] = {"model_id": "organism/induction", "k_values": [1, 2, 4, 8]}

    seq_len: Whole = Field(400, ge=88)  # a token is read in each of six stretches of context
    window: Whole = Field(200, ge=1)
    n_layouts: Whole = Field(8, ge=4)
    n_selecting: Whole = Field(4, ge=1)
    k_values: Wholes = [1, 2, 5, 10, 20, 32]
    n_random_sets: Whole = Field(3, ge=2)
    layer: Whole = Field(-1, ge=-1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)


class NeighborMixing(_WordGraphParameters):
    """Study 2: whether averaging with neighbours is what a model does."""

    study: ClassVar[str] = "02_neighbor_mixing"
    embedded: ClassVar[dict[str, Any]] = {"model_id": "organism/induction", "n_heads": 8, "layer": 4}
    stays_here: ClassVar[str] = "it computes with the weights, which are not sent"

    seq_len: Whole = Field(400, ge=40)
    window: Whole = Field(200, ge=1)
    n_layouts: Whole = Field(8, ge=4)
    n_selecting: Whole = Field(4, ge=1)
    layer: Whole = Field(-1, ge=-1)
    n_heads: Whole = Field(32, ge=1)
    dim: Whole = Field(4096, ge=2)
    n_seeds: Whole = Field(20, ge=2)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)


class HeadsInLanguage(_WordGraphParameters):
    """Appendix 1a: the heads of the grid task in natural text, and further checks of study 1."""

    study: ClassVar[str] = "1a_heads_in_language"
    appendix: ClassVar[bool] = True
    embedded: ClassVar[dict[str, Any]] = {"model_id": "organism/induction", "n_heads": 8}

    seq_len: Whole = Field(400, ge=40)
    window: Whole = Field(200, ge=1)
    n_layouts: Whole = Field(8, ge=4)
    n_heads: Whole = Field(32, ge=1)
    n_texts: Whole = Field(16, ge=4)
    layer: Whole = Field(-1, ge=-1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)


class Emergence(_WordGraphParameters):
    """Appendix 1b: an embedded model, and how its circuit appears in training."""

    study: ClassVar[str] = "1b_emergence"
    appendix: ClassVar[bool] = True

    model_id: str = Field("organism/induction", pattern="^organism/")
    seq_len: Whole = Field(400, ge=40)
    window: Whole = Field(100, ge=1)
    n_walks: Whole = Field(16, ge=4)
    n_layouts: Whole = Field(20, ge=4)
    k_values: Wholes = [1, 2, 4, 8]
    layer: Whole = Field(-1, ge=-1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)

    def read_layer(self, n_layers: int) -> int:
        """The block at whose input word means are read; by default as deep as Arditi-26's, 26 of 32."""
        return self.layer if self.layer >= 0 else round(0.81 * n_layers)


class MixingTheory(_GraphParameters):
    """Appendix 2a: spectrum, steps, noise and rank in the toy of study 2."""

    study: ClassVar[str] = "2a_mixing_theory"
    appendix: ClassVar[bool] = True

    dim: Whole = Field(4096, ge=2)
    steps: Whole = Field(1, ge=0)
    self_weight: Real = 1.0
    noise: Real = Field(0.0, ge=0)
    n_seeds: Whole = Field(20, ge=2)
    ranks: Wholes = [1, 2, 4, 8, 16, 32, 64, 128]
    dims: Wholes = [16, 64, 256, 1024, 4096]
    seed: Whole = Field(0, ge=0, lt=2**32)


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
        yield from _called_alike([self.model_id, *self.compare_with], drop="refusal-")
        if self.remote and (here := [name for name in self.compare_with if _not_on_hub(name)]):
            yield f"compare_with: remote, and NDIF serves models of the hub; leave out {', '.join(here)}"
        if 0 < self.n_prompts < 4:
            yield f"n_prompts: {self.n_prompts}; at least 4 are needed, 0 is all"


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
        yield from _called_alike([self.model_id, *self.compare_with])


def why_not_remote(model_id: str) -> str:
    """Why a model cannot run on NDIF from here, and what to do; empty if it may."""
    if reason := _not_on_hub(model_id):
        return f"NDIF serves models of the hub, and {model_id!r} is {reason}"
    if not os.environ.get("NDIF_API_KEY"):
        return "the environment holds no NDIF_API_KEY; get a key at login.ndif.us and export it"
    return ""


def _not_on_hub(model_id: str) -> str:
    """What a model is instead of one of the hub, and what to do; empty if its name can be a hub id."""
    if model_id.startswith("organism/"):
        return "one of this repository; name another model_id"
    return "a folder on this disk; pass the hub id" if Path(model_id).expanduser().is_dir() else ""


def _called_alike(models: list[str], drop: str = "") -> Iterator[str]:
    """A fault for each name that several models would have in tables and figures.

    Args:
        drop: what is left out of the beginning of a name there.
    """
    names = (os.path.normpath(model).split(os.sep)[-1].removeprefix(drop) for model in set(models))
    for name in [name for name, n in Counter(names).items() if n > 1]:
        yield f"compare_with: several models are called {name!r} in tables and figures; rename a folder"


def _names_given(history: list[str], declared: Mapping[str, Any]) -> list[str]:
    """Names assigned in the newest parameters cell and in the newest cell injected after it."""
    own, injected = [], []
    for source in history:
        names, annotated = _assignments(source)
        if set(annotated) & set(declared):
            own, injected = names, []
        elif source.split("\n", 1)[0].strip() == "# Parameters":  # how papermill opens its cell
            injected = names
    return own + injected


def _assignments(source: str) -> tuple[list[str], list[str]]:
    """Names, and names with a type, that a cell of nothing but assignments assigns; else none."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return [], []
    if not all(isinstance(statement, ast.Assign | ast.AnnAssign) for statement in body):
        return [], []
    stored = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name)]
    annotated = [s.target.id for s in body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    return [node.id for node in stored if isinstance(node.ctx, ast.Store)], annotated


def _no_such_parameter(name: str, names: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"no such parameter; {hint}"


def _describe(detail: Mapping[str, Any], schema: type[NotebookParameters]) -> list[str]:
    """One of pydantic's complaints, in the words of a person who typed a parameter."""
    if not detail["loc"]:  # from `faults`, which names its parameters itself
        return str(detail["ctx"]["error"]).splitlines()
    name, *place = detail["loc"]
    kind, context = detail["type"], detail.get("ctx", {})
    if kind.startswith("int_"):
        needed = "a whole number is needed"
    elif kind.startswith("float_"):
        needed = "a number is needed"
    elif kind.startswith("bool_"):
        needed = "true or false is needed"
    elif kind == "list_type":
        example = json.dumps(schema.model_fields[name].default[:2] or ["apple-bird", "bird-car"])
        needed = f"a list is needed, as in -p {name} '{example}'"
    elif kind == "literal_error":
        needed = f"allowed: {context['expected']}"
    elif kind == "greater_than_equal":
        needed = f"at least {context['ge']} is needed"
    elif kind == "value_error":
        needed = str(context["error"])
    else:
        needed = detail["msg"].replace("Input should be", "should be")
    label = name + "".join(f"[{index}]" for index in place)
    return [f"{label}: got {reprlib.repr(detail['input'])}; {needed}"]
