"""The site that `make site` builds: README, notebooks as they are stored, model cards. Nothing is executed.

Pages stand at the places of their sources, so that relative links mean on the site what they mean in the
repository. All that a page needs lies beside it: it can be opened from disk, and asks no other machine.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).resolve().parent.parent

project = "Latent geometry notebooks"
extensions = ["myst_nb"]
root_doc = "README"
include_patterns = ["**.md", "notebooks/**.ipynb"]
exclude_patterns = [".*", "build", "figures", "lib", "runs", "tests"]
suppress_warnings = ["toc.empty_glob"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js = {}

html_theme = "furo"
html_title = project
html_favicon = "static/favicon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_math_renderer = "mathml"
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_show_sphinx = False
html_show_search_summary = False  # summaries are fetched, which browsers refuse from disk

CONTENTS = """

```{toctree}
:hidden:
:glob:

notebooks/*
notebooks/appendix/*
docs/models
*/*
*/*/*
*
```
"""
CONTROLS = "*Where a kernel runs (`make lab`), controls stand here; figures around show the same at rest.*"


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))
    app.connect("source-read", _read)
    app.connect("doctree-read", _keep_inside, priority=100)  # before Sphinx collects images and downloads
    app.connect("build-finished", _finish)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        source[0] = _join_alts(source[0]) + CONTENTS
    elif docname.startswith("notebooks/"):
        notebook = json.loads(source[0])
        notebook["metadata"].pop("widgets", None)
        section = ""
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = _join_alts("".join(cell["source"]))
                section = ([section] + re.findall(r"^#+ (.+)$", cell["source"], re.MULTILINE))[-1]
            elif cell["cell_type"] == "code":
                cell["outputs"] = [_still(output) for output in cell["outputs"]]
                if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
                    image = {"alt": _alt(cell, Path(docname).name) or f"Figure: {section}"}
                    cell["metadata"].setdefault("mystnb", {"image": image})
        source[0] = json.dumps(notebook)


def _join_alts(text: str) -> str:
    # The parser drops line ends in alt texts, and the space between two words with them.
    return re.sub(r"!\[[^\]]*\]", lambda alt: alt[0].replace("\n", " "), text)


def _still(output: dict) -> dict:
    """The output, or what stands in the place of a live control."""
    if "application/vnd.jupyter.widget-view+json" not in output.get("data", {}):
        return output
    return {"output_type": "display_data", "data": {"text/markdown": CONTROLS}, "metadata": {}}


def _alt(cell: dict, study: str) -> str | None:
    """What `study.figure(fig, NAME, alt=...)` of the cell said when it ran, from the record of that run."""
    for call in ast.walk(ast.parse("".join(cell["source"]))):
        match call:
            case ast.Call(func=ast.Attribute(ast.Name("study"), "figure"), args=[_, ast.Constant(name)]):
                path = ROOT / "figures" / study / "record.json"
                filed = json.loads(path.read_text())["artifacts"] if path.exists() else {}
                if f"{name}.png" not in filed:
                    raise ExtensionError(f"{path} knows no figure {name!r} that {study} shows: run it again")
                return filed[f"{name}.png"]["alt"]
    return None


def _keep_inside(app: Sphinx, doctree: nodes.document) -> None:
    """Links to files open copies at the same place; for folders and remote pictures, words stand."""
    here = Path(app.env.doc2path(app.env.docname)).parent
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link["reftarget"] and (here / link["reftarget"]).is_dir():
            link.replace_self(link.children)
    for link in list(doctree.findall(addnodes.download_reference)):
        source = (here / link["reftarget"]).resolve()
        target = app.outdir / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        link.replace_self(nodes.reference("", "", *link.children, refuri=link["reftarget"]))
    for image in list(doctree.findall(nodes.image)):
        if "://" in image["uri"]:
            image.replace_self(nodes.Text(image.get("alt") or image["uri"]))


def _math(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    # Browsers set MathML by themselves: no script, no fonts.
    try:
        mathml = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    except MathError as error:
        raise ExtensionError(f"{writer.builder.current_docname}: {node.astext()!r}: {error}") from error
    # Bars are taken for operators and set apart from what they enclose.
    writer.body.append(mathml.replace(">|</mo>", ' lspace="0" rspace="0">|</mo>'))
    raise nodes.SkipNode


def _finish(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        shutil.copyfile(app.outdir / f"{root_doc}.html", app.outdir / "index.html")
