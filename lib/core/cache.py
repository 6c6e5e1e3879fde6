"""Results on disk, by everything that they depend on."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from lib import ROOT
from lib.core.files import npz_bytes, write_whole
from lib.core.progress import note_cached_unit

# What draws computes nothing that is stored: modules whose names end so are no part of a key.
_DRAWING = {"dashboard", "explorer", "figures", "labels", "plots"}
_PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "nnsight",
    "scipy",
    "networkx",
    "safetensors",
    "matplotlib",
    "pydantic",
)
_CACHE_PACKAGES = _PACKAGES[:4]


class Cache:
    """Results on disk, by everything that they depend on.

    An entry is an .npz whose zip comment is the SHA-256 of all bytes before it, written in one step: a
    process killed at any point leaves a whole entry or none, and several may write at once.

    Args:
        folder: None for CACHE_DIR, else .cache; a relative one is taken from the repository's root.
        enabled: whether to read and write at all.
        wing: the package below lib whose code results depend on, besides that of core; "" for all of lib.
    """

    def __init__(self, folder: str | Path | None = None, enabled: bool = True, wing: str = ""):
        self.folder = ROOT / Path(folder or os.environ.get("CACHE_DIR") or ".cache").expanduser()
        self.enabled, self.wing = enabled, wing
        self._is_usable = True

    def get(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """The stored result of `compute`, or a fresh one.

        Args:
            name: of the result, readable; part of the key.
            key: all that `compute` depends on besides code: parameters, weight hash, condition, device.
                Plain values and arrays. The code of lib and the versions of torch, numpy, transformers and
                nnsight are added.
            compute: a function of core or of the wing; returns arrays by name. For any other one the key
                needs an entry `code`, which changes when its code does.

        Returns:
            Arrays by name. A damaged entry is reported on stderr and computed again. So is, once, a folder
            that can not be read or written, whose results are not kept.

        Raises:
            ValueError: a function of another place and a key without `code`.
            TypeError: a key or results that are neither plain nor arrays.
        """
        package, *below = _module_of(compute).split(".")
        if "code" not in key and (package != "lib" or (self.wing and below[0] not in ("core", self.wing))):
            raise ValueError(
                f"cache {name}: {_module_of(compute)} is not of lib.core or lib.{self.wing or '*'}, whose "
                "code is part of every key; give the key an entry code that changes when the code does"
            )
        if not self.enabled:
            return _arrays(name, compute())
        full_key = canonical_json(
            {
                "name": name,
                "key": key,
                "code": code_version(self.wing),
                "versions": _versions(_CACHE_PACKAGES),
            }
        )
        path = self.folder / f"{name}-{hashlib.sha256(full_key.encode()).hexdigest()[:32]}.npz"
        try:
            stored = _read_entry(path.read_bytes(), full_key)
            note_cached_unit()
            return stored
        except FileNotFoundError:
            pass
        except OSError as error:
            self._say_unusable(error)
        except Exception as error:  # whatever a damaged file makes numpy and zipfile raise
            print(f"cache: {path} is damaged ({error}); computing it again", file=sys.stderr)
        arrays = _arrays(name, compute())
        try:
            write_whole(path, _entry(arrays, full_key))
        except OSError as error:
            self._say_unusable(error)
        return arrays

    def _say_unusable(self, error: OSError) -> None:
        if self._is_usable:
            reason = error.strerror or error
            print(f"cache: {self.folder} can not be used ({reason}); results are not kept", file=sys.stderr)
        self._is_usable = False


def code_version(wing: str = "") -> str:
    """Hash over the modules of core and of a wing that results depend on: all but those that draw.

    When they were edited since this process imported lib, it may run either version, or some of both:
    the hash is then of its own, so that no other process takes those results for its own.

    Args:
        wing: a package below lib; "" for every one.
    """
    now, before = _version_of(_sources(), wing), _version_of(_AT_IMPORT, wing)
    return now if now == before else short_hash(f"{before} {now}")


def _sources() -> dict[str, str]:
    """Text of every module of lib that computes, by its path below lib."""
    paths = (path for path in sorted((ROOT / "lib").glob("*/*.py")) if not _draws(path))
    return {path.relative_to(ROOT / "lib").as_posix(): path.read_text(encoding="utf-8") for path in paths}


def _draws(path: Path) -> bool:
    return path.stem.split("_")[-1] in _DRAWING


def _version_of(sources: dict[str, str], wing: str) -> str:
    parts = {"core", wing} if wing else {path.split("/")[0] for path in sources}
    return short_hash(
        json.dumps({path: text for path, text in sources.items() if path.split("/")[0] in parts})
    )


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_AT_IMPORT = _sources()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **_versions(_PACKAGES)}


def _module_of(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__module__


def canonical_json(value: Any) -> str:
    """JSON in which equal values are equal text: sorted, arrays by hash, nothing that JSON would change."""
    return json.dumps(_plain(value), sort_keys=True, allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return {
            "shape": list(array.shape),
            "dtype": array.dtype.str,
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} {value!r} can not be part of a key; pass plain values or arrays")


def _arrays(name: str, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {key: np.asarray(value) for key, value in result.items()}
    for key, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"cache {name}: {key} is no array of numbers")
    return arrays


def _entry(arrays: dict[str, np.ndarray], full_key: str) -> bytes:
    data = npz_bytes({"__key__": np.frombuffer(full_key.encode(), np.uint8), **arrays})
    body = data[:-2] + (64).to_bytes(2, "little")  # the last two bytes of a zip: length of its comment
    return body + hashlib.sha256(body).hexdigest().encode()


def _read_entry(data: bytes, full_key: str) -> dict[str, np.ndarray]:
    if hashlib.sha256(data[:-64]).hexdigest().encode() != data[-64:]:
        raise ValueError("its bytes are not those that were written")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = dict(file)
    if arrays.pop("__key__").tobytes().decode() != full_key:
        raise ValueError("it belongs to another key")
    return arrays


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
