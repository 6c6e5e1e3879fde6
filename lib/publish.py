"""Where this repository lives, written wherever a reader needs it: `python -m lib.publish [URL [COMMIT]]`.

URL and COMMIT are kept in CITATION.cff, as `repository-code` and `commit`. From there they go into the badges
of README.md, and into the cell of every notebook by which one that stands alone fetches the repository.
Without arguments these places are brought into line with CITATION.cff, as after adding a notebook.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from itertools import chain
from pathlib import Path

import yaml

from lib import ROOT

TAG = "install"
CELL = """import sys
from importlib.util import find_spec

if find_spec("lib") is None:  # this notebook stands alone, as on Colab: fetch its repository first
    from subprocess import run
    fetch = 'git fetch -q --depth 1 "${{1:?clone the repository and open this notebook there}}" "$2"'
    get = f'git init -q repository && cd repository && {{fetch}} && git checkout -q FETCH_HEAD'
    run(["sh", "-c", get + ' && "$0" binder/install.py', sys.executable, "{url}", "{commit}"], check=True)
    sys.path.insert(0, "repository")"""
COLAB = "https://colab.research.google.com/github/{place}/blob/main/notebooks/{study}.ipynb"
BINDER = "https://mybinder.org/v2/gh/{place}/{commit}?labpath=notebooks%2F00_start_here.ipynb"


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.publish", description=__doc__.split("\n")[0])
    parser.add_argument("url", nargs="?", help="https://github.com/OWNER/NAME")
    parser.add_argument("commit", nargs="?", default="HEAD", help="what notebooks fetch; pushed (HEAD)")
    options = parser.parse_args(argv)
    if untagged := [path.name for path in notebooks(root) if "parameters" not in chain(*_tags(path))]:
        parser.error(f"{', '.join(untagged)}: no cell is tagged parameters: the fetching one goes after it")
    if options.url:
        options.url = options.url.rstrip("/").removesuffix(".git")  # as git remote has it
        if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", options.url):
            parser.error(f"{options.url}: Colab and Binder need an address as https://github.com/OWNER/NAME")
        git = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", f"{options.commit}^{{commit}}"]
        found = subprocess.run(git, capture_output=True, text=True)
        if found.returncode:
            parser.error(f"{options.commit}: this repository has no such commit")
        _write_citation(root / "CITATION.cff", options.url, found.stdout.strip())
    url, commit = published(root)
    readme = root / "README.md"
    studies = [path.stem for path in notebooks(root)]
    readme.write_text(with_badges(readme.read_text(encoding="utf-8"), url, commit, studies), encoding="utf-8")
    for path in notebooks(root):
        _write_cell(path, CELL.format(url=url, commit=commit))
    if url:
        print(f"{url} at {commit}: README.md and {len(studies)} notebooks say so")
    else:
        print(f"CITATION.cff has no address: README.md has no badges, {len(studies)} notebooks say to clone")
        print("to give one: python -m lib.publish https://github.com/OWNER/NAME")


def published(root: Path = ROOT) -> tuple[str, str]:
    """Address and commit of CITATION.cff, empty where it has none."""
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    return citation.get("repository-code", ""), citation.get("commit", "")


def notebooks(root: Path = ROOT) -> list[Path]:
    """The notebooks of the repository, in order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def with_badges(readme: str, url: str, commit: str, studies: list[str]) -> str:
    """The front page with its badges below the title; without an address it has none."""
    title, _, rest = readme.partition("\n\n")
    if rest.startswith("[!["):
        rest = rest.partition("\n\n")[2]
    if not url:
        return f"{title}\n\n{rest}"
    place = url.removeprefix("https://github.com/")
    colab = [COLAB.format(place=place, study=study) for study in studies]
    badges = [
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab[0]})",
        f"[![Binder](https://mybinder.org/badge_logo.svg)]({BINDER.format(place=place, commit=commit)})",
        "Colab: " + ", ".join(f"[{study[:2]}]({at})" for study, at in zip(studies, colab, strict=True)),
    ]
    return "\n\n".join([title, "\n".join(badges), rest])


def _tags(path: Path) -> list[list[str]]:
    """Tags of each cell of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell["metadata"].get("tags", []) for cell in cells]


def _write_citation(path: Path, url: str, commit: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("repository-code:", "commit:"))]
    path.write_text("\n".join([*kept, f"repository-code: {url}", f"commit: {commit}", ""]), encoding="utf-8")


def _write_cell(path: Path, source: str) -> None:
    """Put the cell after the parameters, or its source into the one that is there."""
    document = json.loads(path.read_text(encoding="utf-8"))
    tags = [*_tags(path), []]
    place = next(i for i, of_cell in enumerate(tags) if "parameters" in of_cell) + 1
    if TAG not in tags[place]:
        cell = {"cell_type": "code", "execution_count": None, "outputs": [], "source": []}
        cell["metadata"] = {"jupyter": {"source_hidden": True}, "tags": [TAG]}
        if document["nbformat_minor"] >= 5:  # earlier formats allow no names
            cell["id"] = TAG
        document["cells"].insert(place, cell)
    document["cells"][place]["source"] = source.splitlines(keepends=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True)  # as lib.run stores it
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
