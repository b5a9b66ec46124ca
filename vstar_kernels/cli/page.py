"""The pages that commands write: HTML from templates, each page one file without links.

A template ``{% extends "page.html" %}`` and fills its blocks ``title``, ``style`` and ``body``;
``{% import "macros.html" as ui %}`` brings sections, tables and figures. Whatever a template is
given is escaped.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"


class Colours(NamedTuple):
    """What figures are drawn with on a page: text, this package's figures and those of others."""

    text: str
    ours: str
    peers: str


LIGHT = Colours(text="#1d2329", ours="#1f8a70", peers="#b3bcc5")
DARK = Colours(text="#e4e8ec", ours="#3fb896", peers="#56616c")


def render(template: str, *folders: Path, **values: Any) -> str:
    """Returns the page that a template makes of some values.

    Args:
        template: Its file's name, in one of the folders or in this package's.
        folders: Where templates of the caller's are.
        values: What the template shows. One that it names and does not get is an error.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values) + "\n"


def data_uri(content: bytes, kind: str) -> str:
    """Returns an image, such as ``"png"`` or ``"svg+xml"``, as an address that holds all of it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def figure_uri(figure: Figure) -> str:
    """Returns a Matplotlib figure as an SVG image's data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return data_uri(buffer.getvalue(), "svg+xml")
