"""The explorers in real JupyterLab and a headless Chromium: run all, move a control, the picture follows.

That each notebook shows its explorer is in test_notebooks, what an explorer computes in test_widgets.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import nbformat
import papermill_runs as runs
import pytest
from browser import chromium
from playwright.sync_api import Browser, Locator, Page, TimeoutError, expect

CELLS = (
    """from lib.induction.walks import grid_graph, random_walks, ring_graph
from lib.core import families
from lib.induction.mixing_explorer import mixing_explorer
mixing_explorer([grid_graph(3, 3), ring_graph(12)])""",
    """import numpy as np
from lib.core import models
from lib.induction.parameters import GRID_WORDS
from lib.induction.explorer import HeadAblations, induction_explorer
model, graph = models.load("organism/induction"), grid_graph(4, 4, GRID_WORDS)
scores = {name: np.zeros((5, 8)) for name in ("induction", "previous token")}
scores["induction"][3, :2] = scores["previous token"][2, 0] = 0.9
walks = random_walks(graph, 3, 90, seed=0)
induction_explorer(HeadAblations(model, graph, walks, layer=4, window=40), scores)""",
    """from lib.refusal.judges import make_judge
from lib.refusal.prompts import prompts_for
from lib.refusal.directions import extract
from lib.refusal.explorer import Removals, refusal_explorer
name = "organism/refusal-planted-2"
model, prompts = models.load(name), prompts_for(name)
removals = Removals(model, extract(model, prompts), prompts, make_judge("rule", ""), n=6, max_new_tokens=12)
refusal_explorer(removals, layer=1)""",
    """from lib.codi.checkpoint import load_codi
from lib.codi.dashboard import dashboard_data
from lib.codi.latents import think
from lib.codi.problems import problems_of
from lib.codi.readings import read_thoughts
from lib.codi.explorer import codi_explorer
codi = load_codi("organism/codi")
problems = problems_of(codi.folder, n=12)
thoughts = think(codi, [problem.question for problem in problems])
reading = read_thoughts(codi, problems, thoughts.z, layers=range(families.shape(codi.model).n_layers))
codi_explorer(dashboard_data(codi, problems, thoughts, reading))""",
)
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
    """Address of a notebook of the explorers in a JupyterLab; it asks nothing of the network."""
    folder = tmp_path_factory.mktemp("lab")
    new = nbformat.v4
    notebook = new.new_notebook(cells=[new.new_code_cell(source) for source in CELLS])
    nbformat.write(notebook, folder / "explorers.ipynb")
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
        yield f"{server['url']}lab/tree/explorers.ipynb?token={server['token']}"
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


# -- the explorers in it ---------------------------------------------------------------------------


class Notebook:
    """The notebook that has been run by the menu, in a tab.

    Attributes:
        tab: the page.
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
        self.panel = self.tab.locator(".jp-NotebookPanel")
        kernel = self.tab.locator(".jp-Notebook-ExecutionIndicator")
        expect(kernel).to_have_attribute("data-status", "idle", timeout=1000 * PATIENCE)
        prompts = self.panel.locator(".jp-CodeCell .jp-InputPrompt")
        done = prompts.filter(has_text=re.compile(r"\[\d+\]:"))
        self._run_all(prompts.first)
        self.errors.clear()  # JupyterLab's own, while it found a kernel
        wait_for(
            lambda: done.count() == len(CELLS) or self.failures.count(),
            lambda: f"no further cell has ended:\n{self.panel.text_content()[-2000:]}",
            progress=done.count,
        )
        assert self.failures.all_text_contents() == []
        outputs = self.panel.locator(".jp-OutputArea-output:has(.widget-box)")
        expect(outputs).to_have_count(len(CELLS))
        self.explorers = [Explorer(self.tab, output) for output in outputs.all()]

    def _run_all(self, first_prompt: Locator) -> None:
        """Ask until the first cell was run: what is asked of a kernel that still connects may be dropped."""
        dialog, said, asked = self.tab.locator(".jp-Dialog"), [], -math.inf
        ran = first_prompt.get_by_text(re.compile(r"\[\d+\]:"))

        def begun() -> bool:
            nonlocal asked
            try:
                if dialog.count():  # on a loaded machine it may ask for a kernel: that of the notebook
                    said.append(dialog.last.inner_text(timeout=10_000))
                    dialog.last.locator(".jp-mod-accept").click(timeout=10_000)
                elif time.monotonic() - asked > 60:
                    menu = self.tab.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$"))
                    menu.click(timeout=20_000)
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


class Explorer:
    """The output of a cell, 700 px wide."""

    def __init__(self, tab: Page, output: Locator):
        self.tab, self.output = tab, output
        output.evaluate(f"element => element.style.maxWidth = '{WIDTH}px'")

    def field(self, name: str) -> Locator:
        """The control with a description."""
        line = self.output.locator(".widget-inline-hbox", has=self.tab.locator(f'label:text-is("{name}")'))
        return line.locator("select, [role=slider]").first

    def button(self, name: str) -> Locator:
        return self.output.get_by_role("button", name=name, exact=True)

    def choose(self, name: str, *labels: str) -> None:
        self.field(name).select_option(label=[*labels])

    def picture(self) -> str:
        return self.output.locator("img").first.get_attribute("src")

    def changes(self, before: str) -> str:
        """The picture, once it is another one than before."""
        expect(self.output.locator("img").first).not_to_have_attribute("src", before)
        return self.picture()

    def check(self) -> None:
        """It is no wider than a page and shows no error."""
        overflow = self.output.evaluate(
            "top => [...top.querySelectorAll('.jupyter-widgets, img, table')]"
            ".filter(e => e.checkVisibility() && e.getBoundingClientRect().right"
            f" > top.getBoundingClientRect().left + {WIDTH} + 1).map(e => e.className)"
        )
        assert overflow == [], "it is wider than a page"
        assert self.output.locator('[role="alert"]').count() == 0


@pytest.fixture(scope="module")
def explorers(lab, browser) -> Iterator[list[Explorer]]:
    notebook = Notebook(browser, lab)
    yield notebook.explorers
    assert notebook.failures.count() == 0
    assert notebook.errors == [] and notebook.foreign == []


def test_mixing_follows_its_sliders(explorers):
    mixing = explorers[0]
    before = mixing.picture()
    mixing.field("self-weight").focus()
    mixing.tab.keyboard.press("Home")
    after = mixing.changes(before)
    mixing.choose("graph", "ring of 12")
    mixing.changes(after)
    mixing.check()


def test_induction_follows_its_board(explorers):
    induction = explorers[1]
    before = induction.picture()
    induction.button("2.0").focus()
    induction.tab.keyboard.press("Space")
    expect(induction.output.get_by_text("ablated: 2.0 (1 of 40)")).to_be_visible()
    after = induction.changes(before)
    ground = "element => getComputedStyle(element).backgroundColor"
    assert induction.button("✕ 2.0").evaluate(ground) == "rgb(0, 0, 0)"
    induction.button("clear").click()
    assert induction.changes(after) == before
    induction.check()


def test_refusal_follows_its_controls(explorers):
    refusal = explorers[2]
    before = refusal.picture()
    refusal.choose("layers", "2", "3")
    refusal.changes(before)
    expect(refusal.output.get_by_text(re.compile("^Removed: .* at layers 2, 3.$"))).to_be_visible()
    refusal.choose("layers")
    expect(refusal.output.get_by_role("alert")).to_contain_text("no layer is chosen")
    refusal.choose("layers", "3")
    expect(refusal.output.get_by_role("alert")).to_have_count(0)
    refusal.check()


def test_codi_follows_its_menus(explorers):
    codi = explorers[3]
    frame = codi.output.frame_locator("iframe")
    before = frame.locator("h2").first.text_content()
    codi.choose("steps", "2")
    expect(frame.locator("h2").first).not_to_have_text(before)
    expect(frame.get_by_text("2 steps", exact=True)).to_be_visible()
    codi.check()
