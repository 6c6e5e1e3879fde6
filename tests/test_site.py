"""The site: what is stored, complete in itself, and in a real browser fit to be read by everyone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import axe_playwright_python
import pytest
from browser import chromium
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, Page, expect

from lib import ROOT
from lib.core.record import validate_record

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
COMMAND = ["-m", "sphinx", "--quiet", "--fail-on-warning", "--fresh-env", "-c", "docs"]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"


def build(source: Path, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *COMMAND, "-d", folder / "doctrees", source, folder / "site"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    run = build(ROOT, folder)
    assert run.returncode == 0, run.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def soups(site) -> dict[Path, BeautifulSoup]:
    return {path: BeautifulSoup(path.read_text(), "html.parser") for path in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def open_tab(browser, site):
    """A window whose pages must run without an error and ask for nothing but files of the site."""
    contexts, troubles = [], []

    def open_tab(*, scheme: str = "light", width: int = 1280) -> Page:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        context.set_default_timeout(120_000)
        contexts.append(context)
        tab = context.new_page()

        def note(kind: str, what: str) -> None:
            troubles.append((tab.url, kind, what))

        tab.on("pageerror", lambda error: note("error", str(error)))
        tab.on("console", lambda message: note("console", message.text))
        tab.on("requestfailed", lambda request: note("failed", request.url))
        inside = (f"{site.as_uri()}/", "data:")
        tab.on("request", lambda request: request.url.startswith(inside) or note("request", request.url))
        return tab

    yield open_tab
    for context in contexts:
        context.close()
    assert troubles == []


def outputs(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def text_of(value: str | list[str]) -> str:
    return " ".join("".join(value).split())


# -- what is built ---------------------------------------------------------------------------------


def test_make_site_builds_it():
    plan = subprocess.run(["make", "--dry-run", "site"], cwd=ROOT, capture_output=True, text=True).stdout
    assert " ".join(COMMAND) + " -d build/doctrees . build/site" in plan


def test_all_pages_are_in_the_navigation(soups, site):
    sidebar = soups[site / "index.html"].find(class_="sidebar-tree")
    linked = {link["href"] for link in sidebar.find_all("a")}
    pages = {path.relative_to(site).as_posix() for path in soups if "figures" not in path.parts}
    assert pages - {"index.html", "search.html", "README.html"} <= linked


def test_every_link_and_picture_resolves(soups, site):
    """Within the site, fragments included; only links that a reader follows lead out."""
    broken = []
    ids = {path: {tag["id"] for tag in soup.find_all(id=True)} for path, soup in soups.items()}
    for path, soup in soups.items():
        for tag in soup.find_all(lambda tag: tag.has_attr("href") or tag.has_attr("src")):
            url, fragment = urldefrag(tag.get("href", tag.get("src")))
            if urlsplit(url).scheme in ("http", "https") and tag.name == "a" or url.startswith("data:"):
                continue
            target = (path.parent / unquote(urlsplit(url).path)).resolve() if url else path
            inside = target.is_relative_to(site) and target.is_file() and not urlsplit(url).scheme
            if not inside or (fragment and target in ids and fragment not in ids[target]):
                broken.append((path.relative_to(site).as_posix(), str(tag)[:200]))
    assert broken == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_pages_show_what_notebooks_store(notebook, soups, site):
    page = soups[site / notebook.relative_to(ROOT).with_suffix(".html")]
    shown = text_of(page.find("article").text)
    for output in outputs(notebook):
        assert text_of(output.get("text", "")) in shown
    n_pictures = sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    pictures = page.select(".cell_output img")
    assert len(pictures) == n_pictures
    record = validate_record(ROOT / "figures" / notebook.stem / "record.json")
    filed = {artifact.alt for name, artifact in record.artifacts.items() if name.endswith(".png")}
    alts = [picture["alt"] for picture in pictures]
    assert {text_of(alt) for alt in filed} <= set(map(text_of, alts))
    # Controls leave no empty boxes.
    n_controls = sum(WIDGET in output.get("data", {}) for output in outputs(notebook))
    assert page.text.count("Where a kernel runs") == n_controls
    assert "VBox(" not in page.text and not page.find_all("script", type=WIDGET)


def test_broken_links_are_named_and_what_is_elsewhere_stays_there(tmp_path):
    (tmp_path / "README.md").write_text(
        "# Title\n\n[gone](notebooks/gone.ipynb) [a folder](build) $|x|^2$\n"
        "![the\nbadge](https://example.org/badge.svg)\n"
    )
    (tmp_path / "build").mkdir()
    run = build(tmp_path, tmp_path / "build")
    assert run.returncode != 0
    assert "notebooks/gone" in run.stderr and "README.md:3" in run.stderr and "'build'" not in run.stderr
    page = BeautifulSoup((tmp_path / "build" / "site" / "README.html").read_text(), "html.parser")
    assert "the badge" in page.article.text and not page.article.find("img")
    assert "a folder" in page.article.text and not page.article.find("a", string="a folder")
    assert page.article.math.msup.mn.text == "2"


# -- in a browser ----------------------------------------------------------------------------------


# The contrast of a token of code is that of its class: one of each is measured, not thousands.
ONE_OF_EACH_TOKEN = """() => {
  const seen = new Set();
  for (const token of document.querySelectorAll(".highlight span")) {
    const kind = `${token.className} ${token.closest(".cell_output") !== null}`;
    if (seen.has(kind)) token.replaceWith(token.textContent);
    else seen.add(kind);
  }
}"""


def violations(tab: Page) -> list[str]:
    """Serious and critical ones of the page on show."""
    tab.evaluate(ONE_OF_EACH_TOKEN)
    tab.evaluate(AXE)
    options = {"preload": False, "resultTypes": ["violations"]}
    found = tab.evaluate("(options) => axe.run(options)", options)["violations"]
    return [
        f"{tab.url} {rule['id']}: {node['html'][:200]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def of_each_kind(pages: Iterable[Path]) -> set[Path]:
    """All pages, but one of the models' cards, which differ in their words alone."""
    cards = [path for path in pages if "organisms" in path.parts]
    return set(pages) - set(cards[1:])


def overflow(tab: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return tab.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 400)])
def test_every_page_can_be_read(scheme, width, open_tab, soups):
    tab, found = open_tab(scheme=scheme, width=width), []
    for path in of_each_kind(soups):
        tab.goto(path.as_uri())
        assert overflow(tab) <= 0, path
        found += violations(tab)
    assert found == []


def test_search_finds_a_notebook(open_tab, site):
    tab = open_tab()
    tab.goto((site / "index.html").as_uri())
    tab.get_by_role("textbox", name="Search").fill("Dirichlet")
    tab.keyboard.press("Enter")
    result = tab.locator("#search-results a", has_text="Neighbour mixing").first
    expect(result).to_be_visible()
    result.click()
    expect(tab.locator("h1")).to_contain_text("Neighbour mixing")
