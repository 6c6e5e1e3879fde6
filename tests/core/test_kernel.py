"""What a person meets in a live kernel when something goes wrong, or lib is edited."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel
from tiny import save_tiny

from lib import ROOT
from lib.core.kernel import PlainError
from lib.core.record import RecordError
from lib.refusal.api import NoReply, Rejected

SETUP = """from lib.induction.parameters import InductionAblation
from lib.core.record import Study
study = Study(InductionAblation, globals())"""
LOAD = """import torch
from lib.core import attention, models
model = models.load(MODEL)
ids = torch.tensor([[0, 3, 4, 5]])"""


class Kernel:
    """A kernel with a copy of lib that can be edited."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self.manager, self.client = start_new_kernel(env=environment, cwd=str(folder))

    def run(self, code: str, attended: bool = True) -> str:
        """What a cell shows: what it prints, or its error."""
        said = []

        def collect(message) -> None:
            content = message["content"]
            if message["msg_type"] == "error":
                said.append("\n".join(content["traceback"]))
            elif message["msg_type"] == "stream":
                said.append(content["text"])

        reply = self.client.execute_interactive(code, allow_stdin=attended, output_hook=collect, timeout=600)
        self.status = reply["content"]["status"]
        return re.sub(r"\x1b\[[0-9;]*m", "", "".join(said))

    def edit(self, module: str, old: str, new: str) -> None:
        path = self.folder / "lib" / f"{module}.py"
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    started = Kernel(folder)
    paths = f"out_dir, MODEL = {str(folder / 'out')!r}, {str(save_tiny('llama', folder / 'llama'))!r}"
    assert [started.run(code) for code in (paths, SETUP, LOAD)] == ["", "", ""]
    yield started
    started.client.stop_channels()
    started.manager.shutdown_kernel(now=True)


HEAD = "with torch.no_grad(), model.trace(ids):\n    first = model.layers[0].output\n"


@pytest.mark.parametrize(
    ("code", "culprit", "message"),
    [
        (HEAD + "    model.layers[7].input", "----> 3     model.layers[7].input", "has attribute '7'"),
        (
            HEAD + "    model.layers[1].output[:] = first @ torch.zeros(5, 5)\n    first.save()",
            "----> 3     model.layers[1].output[:] = first @ torch.zeros(5, 5)",
            "mat1 and mat2 shapes cannot be multiplied (4x32 and 5x5)",
        ),
        (
            HEAD + "    attention._offset_means(None, 9)",
            'raise RuntimeError("this model returned no attention probabilities',
            "this model returned no attention probabilities",
        ),
        (
            "attention.attention_spectra(model, ids[:, :1], n_prefix=1)",
            "----> 1 attention.attention_spectra(model, ids[:, :1], n_prefix=1)",
            "stack expects a non-empty TensorList",
        ),
        (
            HEAD + "    model.layers[1].output = first[..., :7]",
            "----> 1 with torch.no_grad(), model.trace(ids):",
            "The size of tensor a (32) must match the size of tensor b (7)",
        ),
    ],
    ids=["layer", "shape", "function of lib", "trace in lib", "given to the model"],
)  # fmt: skip
@pytest.mark.parametrize("attended", [True, False], ids=["person", "papermill"])
def test_error_in_a_trace_shows_the_lines_of_notebook_and_lib(kernel, code, culprit, message, attended):
    said = kernel.run(code, attended)
    assert kernel.status == "error"
    assert culprit in said and message in said.strip().splitlines()[-2 if attended else -1]
    assert len(said.splitlines()) <= 32 and "nnsight" not in said
    assert ("%tb shows all" in said) == attended


def test_whole_traceback_is_at_hand(kernel):
    short = kernel.run(HEAD + "    model.layers[7].output.save()")
    whole = kernel.run("%tb")
    assert "nnsight/intervention/tracer.py" in whole and "----> 3     model.layers[7].output.save()" in whole
    assert len(whole.splitlines()) > 5 * len(short.splitlines())


def test_other_errors_are_as_they_were(kernel):
    cells = ["import json\njson.loads('{')", "def f(:\n    pass", "if 1:\nx", "1 / 0"]
    ours = [kernel.run(code) for code in cells]
    handler = kernel.run("custom = get_ipython().custom_exceptions; get_ipython().custom_exceptions = ()")
    theirs = [kernel.run(code) for code in cells]
    kernel.run("get_ipython().custom_exceptions = custom")
    assert handler == "" and "json/decoder.py" in ours[0]
    assert [re.sub(r"In\[\d+\]", "", said) for said in ours] == [re.sub(r"In\[\d+\]", "", t) for t in theirs]


def test_edited_lib_asks_for_a_restart(kernel):
    assert kernel.run(SETUP) == "", "nothing was edited"
    kernel.edit("core/claims", "import html\n", "import html  # edited\n")
    said = kernel.run(SETUP)
    assert kernel.status == "error" and "lib/core/claims.py" in said and "restart the kernel" in said
    assert len(said.splitlines()) == 1
    kernel.edit("core/claims", "import html  # edited\n", "import html\n")
    assert kernel.run(SETUP) == "", "what was taken back is as it was"


def test_every_error_of_lib_is_shown_without_a_traceback():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "lib").rglob("*.py")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.__name__
    }
    # Those that no one sees: the judge counts these two, and the others stay within their module.
    found = {error for error in found - {NoReply, Rejected} if not error.__name__.startswith("_")}
    assert RecordError in found and len(found) > 10
    assert [error for error in found if not issubclass(error, PlainError)] == []
