"""One HTML file without links to anything, for light and dark screens."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #5b6670; --line: #d8dde2;
  --page: #ffffff; --bar: #b3bcc5; --ours: #1f8a70; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #9aa5af; --line: #37404a;
  --page: #15191d; --bar: #56616c; --ours: #3fb896; --bad: #ff8a80; } }
body { margin: 2.5rem auto; max-width: 60rem; padding: 0 1.25rem; background: var(--page);
  color: var(--text); font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.soft, figcaption, th { color: var(--soft); }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
tr.ours td { font-weight: 600; }
.facts { font-size: .85rem; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); width: 14rem; }
figure { margin: 0; }
figcaption { font-size: .82rem; line-height: 1.4; margin-top: .35rem; }
.maps { display: grid; gap: 1rem; margin-bottom: 1rem; }
.maps img { width: 100%; image-rendering: pixelated; display: block; }
.videos { display: flex; flex-wrap: wrap; gap: 1rem; }
.scale { display: inline-block; width: 8rem; height: .7rem; vertical-align: -1px; }
svg { width: 100%; max-width: 44rem; display: block; font: 13px system-ui, sans-serif; }
svg text { fill: var(--text); dominant-baseline: central; }
svg .label { text-anchor: end; }
svg .bar { fill: var(--bar); }
svg .ours { fill: var(--ours); }
"""


def page(title: str, body: str, style: str = "") -> str:
    """The whole document; ``style`` is added to the common one."""
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n{body}\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading."""
    return f"<section><h2>{title}</h2>\n" + "\n".join(parts) + "</section>"


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values."""
    rows = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in pairs
    )
    return f'<table class="facts">{"".join(rows)}</table>'
