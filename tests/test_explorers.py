"""The explorers in real JupyterLab and a headless Chromium: run all, move a control, the picture follows.

Of a notebook only the cells that its explorer builds on are run.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import subprocess
import symtable
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
import papermill_runs as runs
import pytest
from browser import chromium
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Browser, Locator, Page, TimeoutError, expect

from lib import ROOT
from lib.parameters import schemas

SMALL = {
    "01_induction_ablation": {
        "k_values": [1, 2], "n_random_sets": 2, "n_layouts": 4, "n_selecting": 1, "n_bootstrap": 100,
    },
    "2a_mixing_theory": {"dim": 256, "n_seeds": 3, "ranks": [1, 4], "dims": [16, 64]},
    "03_refusal_low_rank": {
        "n_prompts": 14, "k_values": [1, 3], "strengths": [0.5, 1.0], "n_random": 1, "n_bootstrap": 100,
    },
    "04_codi_attention": {"compare_with": [], "answer_only": [], "n_problems": 60, "n_bootstrap": 100},
}  # fmt: skip
WIDTH = 700  # px
OWN_FOLDERS = (
    "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR",
    "IPYTHONDIR", "CACHE_DIR",
)  # fmt: skip
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are in the page
}

PATIENCE = 600  # s without progress; a loaded machine is slow, and what hangs never ends

expect.set_options(timeout=180_000)  # ms


# -- JupyterLab ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """Address of a notebook in a JupyterLab over small copies of them; it asks nothing of the network."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    only_pictures = shutil.ignore_patterns("*.svg", "*.npz", "*.json", "*.html")
    shutil.copytree(ROOT / "figures", folder / "figures", ignore=only_pictures)  # shown before a run
    for path in (path for path in (ROOT / "notebooks").rglob("*.ipynb") if path.stem in SMALL):
        nbformat.write(small(path, folder / "runs"), folder / "notebooks" / path.name)
    for name, values in SETTINGS.items():
        file = folder / "jupyterlab_settings_dir" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    environment = {name: str(folder / name.lower()) for name in OWN_FOLDERS} | {"OMP_NUM_THREADS": "2"}
    options = [
        "--no-browser", "--allow-root", "--ServerApp.port=0", f"--ServerApp.root_dir={folder}",
        "--LabApp.extension_manager=readonly", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with open(folder / "lab.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        file = folder / "jupyter_runtime_dir" / f"jpserver-{process.pid}.json"
        wait_for(file.is_file, lambda: (folder / "lab.log").read_text()[-3000:])
        server = json.loads(file.read_text())
        yield f"{server['url']}lab/workspaces/{{0}}/tree/notebooks/{{0}}.ipynb?token={server['token']}"
    finally:
        runs.kill(process)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def wait_for(ready, why, progress=lambda: None) -> None:
    """Wait while there is progress, and give up `PATIENCE` after the last one."""
    end, reached = time.monotonic() + PATIENCE, progress()
    while not ready():
        if (now := progress()) != reached:
            end, reached = time.monotonic() + PATIENCE, now
        assert time.monotonic() < end, why()
        time.sleep(0.2)


def small(path: Path, runs: Path) -> nbformat.NotebookNode:
    """A notebook with small parameters, without outputs: the cells that its explorer builds on."""
    values = schemas()[path.stem].embedded | SMALL[path.stem] | {"out_dir": str(runs / path.stem)}
    notebook = parameterize_notebook(load_notebook_node(str(path)), values)
    notebook.cells = built_on(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def built_on(cells: list) -> list:
    """The cell that shows an explorer, and those before it that give or change a name that it needs."""
    cells = [cell for cell in cells if cell.cell_type == "code"]
    [last] = [i for i, cell in enumerate(cells) if re.search(r"^\w+_explorer\(", cell.source, re.MULTILINE)]
    kept, needed = [cells[last]], names(cells[last].source).used
    for cell in reversed(cells[:last]):
        found = names(cell.source)
        if (found.given | found.changed) & needed or "parameters" in str(cell.metadata.get("tags")):
            kept.insert(0, cell)
            needed = (needed - found.given) | found.used
    return kept


class Names(NamedTuple):
    """What a cell gives anew, what it changes or may give, and what it needs from cells before."""

    given: set[str]
    changed: set[str]
    used: set[str]


def names(source: str) -> Names:
    found = Names(set(), set(), set())
    for statement in ast.parse(source).body:
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
        assigned = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
        changed, used = changes(statement), {*reads(table)}
        if isinstance(statement, ast.For | ast.With):  # reads its own variables
            used -= assigned
        found.used.update((used | changed) - found.given)
        if isinstance(statement, ast.For | ast.While | ast.If | ast.Try):  # perhaps
            changed |= assigned
        found.changed.update(changed)
        found.given.update(assigned - changed)
    return found


def reads(table: symtable.SymbolTable) -> Iterator[str]:
    """Names of the notebook that a statement reads, in functions and comprehensions too."""
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global()):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from reads(inner)


def changes(statement: ast.stmt) -> set[str]:
    """Names whose things are changed in place: x += ..., x[0] = ..., x.append(...)."""
    found = set()
    for node in ast.walk(statement):
        match node:
            case (
                ast.AugAssign(ast.Name(name))
                | ast.Subscript(ast.Name(name), ctx=ast.Store())
                | ast.Subscript(ast.Subscript(ast.Name(name)), ctx=ast.Store())
                | ast.Call(ast.Attribute(ast.Name(name), "append" | "extend" | "update" | "setdefault"))
            ):
                found.add(name)
    return found


def test_cells_that_an_explorer_builds_on_are_found():
    sources = [
        "import numpy as np",
        "x = [1]",
        "fig, ax = draw(x)",
        "x.append(2)",
        "w = 1",
        "w = 2",
        "def f(y):\n    return [np.exp(z + w) for z in y]",
        "for i in x:\n    print(i)",
        "some_explorer(f(x))",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    assert [sources.index(cell.source) for cell in built_on(cells)] == [0, 1, 3, 5, 6, 8]


# -- a notebook in it ------------------------------------------------------------------------------


class Notebook:
    """A notebook that has been run by the menu, in a tab.

    Attributes:
        tab: the page.
        explorer: output of the cell with the explorer, 700 px wide.
        errors: of the browser's console.
        foreign: addresses outside of this machine that the page asked for.
    """

    def __init__(self, browser: Browser, address: str):
        self.tab: Page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.errors, self.foreign = [], []
        self.tab.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("request", self._note)
        self.tab.goto(address)
        panel = self.tab.locator(".jp-NotebookPanel")
        kernel = self.tab.locator(".jp-Notebook-ExecutionIndicator")
        expect(kernel).to_have_attribute("data-status", "idle", timeout=1000 * PATIENCE)
        prompts = panel.locator(".jp-CodeCell .jp-InputPrompt")
        done = prompts.filter(has_text=re.compile(r"\[\d+\]:"))
        self._run_all(prompts.first)
        self.errors.clear()  # JupyterLab's own, while it found a kernel
        last = prompts.last
        wait_for(
            lambda: re.fullmatch(r"\[\d+\]:", last.text_content()) or self.failures.count(),
            lambda: f"no further cell has ended:\n{panel.text_content()[-2000:]}",
            progress=done.count,
        )
        assert self.failures.all_text_contents() == []
        self.explorer = panel.locator(".jp-OutputArea-output:has(.widget-box)")
        expect(self.explorer).to_have_count(1)
        self.explorer.evaluate(f"element => element.style.maxWidth = '{WIDTH}px'")

    def _run_all(self, first_prompt: Locator) -> None:
        """Ask for it until a cell was run: what is asked of a kernel that still connects may be dropped."""
        dialog, said, asked = self.tab.locator(".jp-Dialog"), [], -math.inf
        ran = first_prompt.get_by_text(re.compile(r"\[\d+\]:"))

        def begun() -> bool:
            nonlocal asked
            try:
                if (
                    dialog.count()
                ):  # on a loaded machine JupyterLab may ask for a kernel: that of the notebook
                    said.append(dialog.last.inner_text(timeout=10_000))
                    dialog.last.locator(".jp-mod-accept").click(timeout=10_000)
                elif time.monotonic() - asked > 60:
                    self.tab.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click(
                        timeout=20_000
                    )
                    item = self.tab.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$"))
                    item.click(timeout=20_000)
                    asked = time.monotonic()
            except TimeoutError:  # a dialog came or went
                self.tab.keyboard.press("Escape")
            return ran.count() > 0

        wait_for(begun, lambda: f"no cell was run: {self.errors}; JupyterLab said {said}")

    @property
    def failures(self) -> Locator:
        kinds = ("error", "stderr")
        return self.tab.locator(", ".join(f'[data-mime-type="application/vnd.jupyter.{k}"]' for k in kinds))

    def _note(self, request) -> None:
        if not re.match(r"(https?|wss?)://(localhost|127\.0\.0\.1)[:/]|data:|blob:|about:", request.url):
            self.foreign.append(request.url)

    def field(self, name: str) -> Locator:
        """The control with a description."""
        line = self.explorer.locator(".widget-inline-hbox", has=self.tab.locator(f'label:text-is("{name}")'))
        return line.locator("select, [role=slider]").first

    def button(self, name: str) -> Locator:
        return self.explorer.get_by_role("button", name=name, exact=True)

    def choose(self, name: str, *labels: str) -> None:
        self.field(name).select_option(label=[*labels])

    def step(self, name: str, key: str, times: int = 1) -> None:
        """Move a slider by keyboard."""
        self.field(name).focus()
        for _ in range(times):
            self.tab.keyboard.press(key)

    def picture(self) -> str:
        return self.explorer.locator("img").first.get_attribute("src")

    def changes(self, before: str) -> str:
        """The picture, once it is another one than before."""
        expect(self.explorer.locator("img").first).not_to_have_attribute("src", before)
        return self.picture()

    def close(self) -> None:
        """Stop the kernel and leave, after looking for what should not have happened."""
        try:
            overflow = self.explorer.evaluate(
                "top => [...top.querySelectorAll('.jupyter-widgets, img, table')]"
                ".filter(e => e.checkVisibility() && e.getBoundingClientRect().right"
                f" > top.getBoundingClientRect().left + {WIDTH} + 1).map(e => e.className)"
            )
            assert overflow == [], "it is wider than a page"
            assert self.explorer.locator('[role="alert"]').count() == 0
            assert self.failures.count() == 0
            assert self.errors == [] and self.foreign == []
        finally:
            self.tab.close()


@pytest.fixture
def run(lab, browser) -> Iterator:
    opened = []

    def run(name: str) -> Notebook:
        opened.append(Notebook(browser, lab.format(name)))
        return opened[-1]

    yield run
    for notebook in opened:
        notebook.close()


def test_mixing_follows_its_sliders(run):
    notebook = run("2a_mixing_theory")
    before = notebook.picture()
    notebook.step("self-weight", "ArrowLeft", 10)
    after = notebook.changes(before)
    notebook.choose("graph", "ring of 12")
    notebook.changes(after)


def test_induction_follows_its_board(run):
    notebook = run("01_induction_ablation")
    before = notebook.picture()
    notebook.button("2.0").focus()
    notebook.tab.keyboard.press("Space")
    expect(notebook.explorer.get_by_text("ablated: 2.0 (1 of 40)")).to_be_visible()
    after = notebook.changes(before)
    assert colours(notebook.button("✕ 2.0")) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    notebook.button("top k induction").click()
    expect(notebook.explorer.get_by_text("(2 of 40)")).to_be_visible()
    after = notebook.changes(after)
    expect(notebook.explorer.get_by_role("button", name="✕")).to_have_count(2)
    assert colours(notebook.button("2.0"))[0] == "rgb(213, 94, 0)", "the hue of previous-token heads is back"
    notebook.button("clear").click()
    assert notebook.changes(after) == before


def test_refusal_follows_its_controls(run):
    notebook = run("03_refusal_low_rank")
    before = notebook.picture()
    intact = notebook.explorer.locator("table").last.inner_text()
    notebook.choose("layers", "2", "3")
    notebook.changes(before)
    notebook.choose("means over", "each category")
    notebook.step("directions k", "ArrowRight", 2)
    expect(notebook.explorer.get_by_text(re.compile("^Removed: 3 of .* at layers 2, 3.$"))).to_be_visible()
    assert notebook.explorer.locator("table").last.inner_text() != intact, "the answers follow"
    notebook.choose("layers")
    expect(notebook.explorer.get_by_role("alert")).to_contain_text("no layer is chosen")
    notebook.choose("layers", "3")
    expect(notebook.explorer.get_by_role("alert")).to_have_count(0)


def test_codi_follows_its_menus(run):
    notebook = run("04_codi_attention")
    title = notebook.explorer.frame_locator("iframe").locator("h2").first
    before = title.text_content()
    notebook.choose("steps", "1")
    expect(title).not_to_have_text(before)
    expect(notebook.explorer.frame_locator("iframe").get_by_text("1 step", exact=True)).to_be_visible()


def colours(element: Locator) -> list[str]:
    """Of its ground and its text."""
    return element.evaluate("e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]")
