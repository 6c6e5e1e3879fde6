"""Arrays that other people released: read, checked, and said what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib.core.kernel import PlainError

if TYPE_CHECKING:
    pass

AXES = {
    "class_means": ("node", "d"),
    "activations": ("walk", "token", "d"),
    "nodes": ("walk", "token"),
    "previous": ("walk", "token"),
    "spectra": ("sequence", "layer", "head", "offset"),
    "spectrum": ("layer", "head", "offset"),
    "previous_token": ("layer", "head"),
    "induction": ("layer", "head"),
    "anti_induction": ("layer", "head"),
    "vectors": ("layer", "d"),
    "harmful": ("pair", "layer", "d"),
    "safe": ("pair", "layer", "d"),
}
# What belongs together has the same sizes; heads and directions of one file may be of different models.
_GROUPS = (
    ("activations", "nodes", "previous", "class_means"),
    ("spectra", "spectrum", "previous_token", "induction", "anti_induction"),
    ("vectors", "harmful", "safe"),
)
_NEEDS = {"activations": "nodes", "nodes": "activations", "previous": "activations", "harmful": "safe",
          "safe": "harmful"}  # fmt: skip
WORDS = {"nodes", "previous"}
ATTENTION = {"spectra", "spectrum", "previous_token", "induction", "anti_induction"}


class ArtifactError(PlainError, ValueError):
    """A file that does not hold what it should; the message names file, array and remedy."""


def read_arrays(path: str | Path, names: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file that the measures know, checked.

    Args:
        path: .npz (no pickled objects) or .safetensors.
        names: what an array is called in the file, by its name here; those that are called as here need no
            entry. Other arrays of the file are left alone.

    Returns:
        Arrays by their name here, floats as float64 and words as int64.

    Raises:
        ArtifactError: a file that can not be read, a name that it does not hold, an array of another number
            of axes, of another type, not finite, or at odds with another one.
    """
    path, names = Path(path).expanduser(), dict(names or {})
    held = _names_in(path)
    for name, theirs in names.items():
        if name not in AXES:
            raise ArtifactError(f"{name!r} is no array that is measured here; there are {', '.join(AXES)}")
        if theirs not in held:
            raise ArtifactError(f"{path} holds no array {theirs!r}; it holds {_described(path, held)}")
    wanted = {name: names.get(name, name) for name in AXES if names.get(name, name) in held}
    if not wanted:
        raise ArtifactError(
            f"{path} holds {_described(path, held)}; none is called {', '.join(AXES)}: say which is which by "
            "names="
        )
    arrays = {name: _array_in(path, theirs) for name, theirs in wanted.items()}
    checked = {
        name: _checked(f"{path}: {names.get(name, name)}", name, array) for name, array in arrays.items()
    }
    _check_together(path, checked)
    return checked


# -- checks ----------------------------------------------------------------------------------------
@contextmanager
def _reading(path: Path, name: str = "") -> Iterator[None]:
    """Within the block errors of a damaged file, or of one of its arrays, are told as such."""
    try:
        yield
    except Exception as error:  # whatever a damaged file makes zipfile, numpy and safetensors raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if first.startswith("Object arrays"):
            raise ArtifactError(f"{path}: {name} holds objects of Python; save it as numbers") from None
        raise ArtifactError(f"{path} can not be read as arrays ({first}); fetch it again") from None


def _names_in(path: Path) -> list[str]:
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such file")
    if path.suffix not in (".npz", ".safetensors"):
        raise ArtifactError(
            f"{path}: files of arrays are .npz or .safetensors, not {path.suffix or 'without suffix'}"
        )
    with _reading(path):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return sorted(file.files)
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return sorted(file.keys())


def _array_in(path: Path, name: str) -> np.ndarray:
    with _reading(path, name):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return file[name]
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:  # numpy's reader has no bfloat16
            tensor = file.get_tensor(name)
        return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _checked(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """An array of the right kind, type and range, as float64 or int64."""
    axes = f"[{', '.join(AXES[name])}]"
    if array.ndim != len(AXES[name]) or 0 in array.shape:
        raise ArtifactError(f"{where} is {list(array.shape)}, and {name} is {axes}")
    if array.dtype.kind not in "iuf":
        raise ArtifactError(f"{where} is of type {array.dtype}; numbers are needed")
    if name in WORDS:
        if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
            raise ArtifactError(f"{where} holds no whole numbers; {name} are numbers of words")
        least = -1 if name == "previous" else 0
        if array.min() < least:
            raise ArtifactError(f"{where} holds {array.min()}; {name} are numbers of words, from {least} on")
        return array.astype(np.int64)
    array = array.astype(np.float64)
    finite = np.isfinite(array)
    if name == "class_means":  # an absent word is NaN throughout
        finite |= np.isnan(array).all(axis=1, keepdims=True)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ArtifactError(
            f"{where} is {array[place]} at {list(place)}; leave it out or fetch the file again"
        )
    if name in ATTENTION and not (array.min() > -1e-6 and array.max() < 1 + 1e-3):
        raise ArtifactError(
            f"{where} goes from {array.min():.3g} to {array.max():.3g}; attention is between 0 and 1"
        )
    return array


def _check_together(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, other in _NEEDS.items():
        if name in arrays and other not in arrays:
            raise ArtifactError(
                f"{path}: {name} are of no use without {other}; add the array, or name it by names="
            )
    for group in _GROUPS:
        sizes: dict[str, tuple[int, str]] = {}
        for name in [name for name in group if name in arrays]:
            for axis, size in zip(AXES[name], arrays[name].shape, strict=True):
                expected, first = sizes.setdefault(axis, (size, name))
                if size != expected:
                    raise ArtifactError(
                        f"{path}: {name} has {size} along its axis {axis!r}, {first} has {expected}; they "
                        "must be of one run"
                    )


def _described(path: Path, names: Iterable[str]) -> str:
    """Such as "means [16, 5], config (no numbers)"."""
    words = []
    for name in names:
        try:
            words.append(f"{name} {list(_array_in(path, name).shape)}")
        except ArtifactError:
            words.append(f"{name} (no numbers)")
    return ", ".join(words) or "nothing"
