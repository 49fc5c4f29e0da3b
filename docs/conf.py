"""Sphinx: the pages of this folder and the API from the docstrings. `make docs` builds them.

Sphinx and not MkDocs, because the docstrings' single backquotes then are cross-references that have
to lead somewhere, and with --fail-on-warning the build says which do not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attnfast import __version__  # noqa: E402

project = "attnfast"
author = "The attnfast authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.mermaid",
]
nitpicky = True
# torch's and Python's own documentation is not read
nitpick_ignore_regex = [("py:.*", r"(torch|nn|collections|contextlib|pathlib)\..*|Tensor")]
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 80
add_module_names = False

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_fence_as_directive = ["math", "mermaid"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page may begin below an included title

html_theme = "furo"
html_title = f"attnfast {release}"
html_show_sphinx = False


PAGE = re.compile(r"<!-- page: (\S+) -->")
ARXIV = re.compile(r"\barXiv:(\d{4}\.\d{4,5})\b")


def on_source_read(app: Sphinx, name: str, source: list[str]) -> None:
    """Read what GitHub reads: pages outside this folder, and its notation for formulas."""
    text = PAGE.sub(lambda match: page_outside(match[1]), source[0])
    source[0] = re.sub(r"\$`(.+?)`\$", r"$\1$", text)


def page_outside(path: str) -> str:
    """A page of the folder above, with links that lead to the same places from here."""
    text = (ROOT / "docs" / path).read_text()
    text = re.sub(r"\]\((?!https?:|#)", "](../", text)
    return text.replace("](../docs/", "](").replace("](../CONTRIBUTING.md", "](contributing.md")


def on_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Make links of papers."""
    lines[:] = [ARXIV.sub(r"`\g<0> <https://arxiv.org/abs/\1>`__", line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the above."""
    app.connect("source-read", on_source_read)
    app.connect("autodoc-process-docstring", on_docstring)
    return {"parallel_read_safe": True}
