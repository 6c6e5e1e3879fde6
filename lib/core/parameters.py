"""Parameters of the studies: one schema a study, checked before anything heavy is loaded.

papermill passes parameters on as they come: it only warns about a name that the notebook does not
have, `-p k_values "[1,2]"` stays a string, and `-y` reads 1e-4 as one. `check` reads such values as
they were meant, or stops with one line for every problem.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lib import ROOT
from lib.core.kernel import PlainError

REAL = "Qwen2.5-Coder-0.5B-Instruct"  # of data/models.yaml: the pretrained model of studies 1 to 3

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
    """Every study's schema, of `parameters.py` in its wing, by the name of the study."""
    for path in (ROOT / "lib").glob("*/parameters.py"):
        importlib.import_module(f"lib.{path.parent.name}.parameters")
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

    @classmethod
    def wing(cls) -> str:
        """The package below lib that the study is of; "" for a schema of another place."""
        package, *below = cls.__module__.split(".")
        return below[0] if package == "lib" else ""

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

    model_id: str = Field(min_length=1)
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


def why_not_remote(model_id: str) -> str:
    """Why a model cannot run on NDIF from here, and what to do; empty if it may."""
    if reason := not_on_hub(model_id):
        return f"NDIF serves models of the hub, and {model_id!r} is {reason}"
    if not os.environ.get("NDIF_API_KEY"):
        return "the environment holds no NDIF_API_KEY; get a key at login.ndif.us and export it"
    return ""


def not_on_hub(model_id: str) -> str:
    """What a model is instead of one of the hub, and what to do; empty if its name can be a hub id."""
    if model_id.startswith("organism/"):
        return "one of this repository; name another model_id"
    return "a folder on this disk; pass the hub id" if Path(model_id).expanduser().is_dir() else ""


def called_alike(models: list[str], drop: str = "") -> Iterator[str]:
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
