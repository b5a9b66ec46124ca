"""The site of these pages: ``make docs`` writes it into build/docs, by Sphinx."""

import re
from typing import Any

from vstar_kernels import __version__

project = "vstar_kernels"
author = "The vstar_kernels authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["*.py"]

html_theme = "furo"
html_title = f"vstar_kernels {version}"
html_copy_source = False

# A link to a page beside docs; tests/test_links.py knows whether it is there.
suppress_warnings = ["myst.xref_missing"]
myst_heading_anchors = 4  # that the pages' links lead to, as where a repository shows them

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False


def _keep_bars(*given: Any) -> None:
    """Has |j − i| in a docstring stand as it is, where Sphinx would put something else into it."""
    lines = given[-1]
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line)


def _shorten_types(*given: Any) -> tuple[str | None, str | None]:
    """Leaves out of a signature the modules that its types are from."""
    signature, returned = (x and re.sub(r"~(?:\w+\.)+", "", x) for x in given[-2:])
    return signature, returned


def setup(app: Any) -> None:
    """Tells Sphinx what is ours."""
    app.connect("autodoc-process-docstring", _keep_bars)
    app.connect("autodoc-process-signature", _shorten_types)
