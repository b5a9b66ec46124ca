"""``report.html``: one file without links to anything, for light and dark screens."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vstar_kernels.demo import charts
from vstar_kernels.demo.summary import COLUMNS, cells

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


def render(results: dict[str, Any], videos: dict[str, Path]) -> str:
    """The page of :func:`vstar_kernels.demo.summary.summarize`'s results and of the gifs."""
    body = "\n".join(
        [
            _head(results),
            _section("Time, memory and agreement", _table(results), _table_notes(results)),
            _section("Time in the temporal attention core", _bars(results, "core_seconds")),
            _section("Time of a whole step", _bars(results, "step_seconds"), _step_note(results)),
            _section("Temporal attention maps", _map_notes(), _maps(results)),
            _section("Videos", _videos(videos)) if videos else "",
            _section("Setting", _facts(_setting(results))),
            _section("Environment", _facts(results["environment"].items())),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>vstar_kernels demo</title>\n<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>\n" + "\n".join(parts) + "</section>"


def _head(results: dict[str, Any]) -> str:
    model = results["model"]
    verdict = (
        f"the same result as eager TAR, {results['core_speedup']:.1f} times as fast "
        "in the temporal attention core"
    )
    if not results["agrees"]:
        verdict = '<span class="bad">a different result from eager TAR: something is wrong</span>'
    return (
        "<h1>Temporal attention regularization, three ways</h1>"
        f"<p><b>vstar_kernels: {verdict}.</b></p>"
        f'<p class="soft">{html.escape(model["description"])}; {model["frames"]} frames of '
        f"{model['latent_height']} × {model['latent_width']} latents, {model['steps']} steps with "
        "classifier-free guidance, each way from the same noise.</p>"
    )


def _table(results: dict[str, Any]) -> str:
    header = "".join(f"<th>{name}</th>" for name in ("", *COLUMNS))
    rows = []
    for name, way in results["ways"].items():
        css = ' class="ours"' if name == "vstar_kernels" else ""
        line = "".join(
            f"<td>{html.escape(cell)}</td>" for cell in (way["label"], *cells(way, results))
        )
        rows.append(f"<tr{css}>{line}</tr>")
    return f'<div class="scroll"><table><tr>{header}</tr>{"".join(rows)}</table></div>'


def _table_notes(results: dict[str, Any]) -> str:
    model = results["model"]
    return (
        f'<p class="soft">Attention core: the {model["regularized_layers"]} regularized of '
        f"{model['temporal_layers']} temporal attention layers, without their to_q, to_k, to_v and "
        "to_out projections, in one step. Times are medians "
        f"(of the core: of layers and steps) over {model['regularized_steps']} steps, in which the "
        "three ways took turns. "
        "Peak memory is the whole process's, or the GPU's allocations, during a step. "
        "Difference: the largest absolute one in the final latents; vstar_kernels may differ by "
        f"{results['tolerance']:.1e}.</p>"
    )


def _bars(results: dict[str, Any], figure: str) -> str:
    column = {"core_seconds": 0, "step_seconds": 2}[figure]
    ways = results["ways"].values()
    return charts.bars(
        [(way["label"], way[figure], cells(way, results)[column]) for way in ways],
        highlight=results["ways"]["vstar_kernels"]["label"],
    )


def _step_note(results: dict[str, Any]) -> str:
    eager = results["ways"]["eager_tar"]
    share = 100 * eager["core_seconds"] / eager["step_seconds"]
    return (
        f'<p class="soft">The attention core is {share:.1f} % of eager TAR\'s step in this model; '
        "the rest is the same in all three, so any larger difference is the machine's noise.</p>"
    )


def _map_notes() -> str:
    return (
        '<p class="soft">Mean over layers, heads and positions at the last regularized step. Rows: '
        "the frame that asks, downwards; columns: the frame that is looked at. Each map is drawn "
        "from its own minimum to its own maximum "
        f'<span class="scale" style="background: {charts.colour_bar()}"></span>. '
        "Neighbours: the share of attention that goes to the frame itself and the ones beside it."
        "</p>"
    )


def _maps(results: dict[str, Any]) -> str:
    rows = []
    for key, title in (("without_tar", "without TAR"), ("with_tar", "with TAR")):
        figures = "".join(_map_figure(level, key, title) for level in results["maps"])
        columns = f"grid-template-columns: repeat({len(results['maps'])}, minmax(0, 1fr))"
        rows.append(f'<div class="maps" style="{columns}">{figures}</div>')
    return "\n".join(rows)


def _map_figure(level: dict[str, Any], key: str, title: str) -> str:
    matrix = level[key]["map"]
    low, high = min(map(min, matrix)), max(map(max, matrix))
    regularized = key == "with_tar" and level["sigma"] is not None
    setting = f", σ = {level['sigma']:g}" if regularized else ""
    if key == "with_tar" and not regularized:
        setting = ", not regularized"
    label = f"level {level['level']} ({level['height']} × {level['width']}), {title}{setting}"
    caption = (
        f"{label}<br>{low:.4f} to {high:.4f}<br>neighbours {100 * level[key]['band_share']:.1f} %"
    )
    return f"<figure>{charts.heat_map(matrix, label)}<figcaption>{caption}</figcaption></figure>"


def _videos(videos: dict[str, Path]) -> str:
    figures = (
        f"<figure>{charts.image_tag(path.read_bytes(), 'gif', label)}"
        f"<figcaption>{html.escape(label)}</figcaption></figure>"
        for label, path in videos.items()
    )
    return f'<div class="videos">{"".join(figures)}</div>'


def _setting(results: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    unused = "width" if results["settings"]["model"] else "prompt"
    given = (
        (f"--{name}", " ".join(map(str, value)) if isinstance(value, tuple) else value)
        for name, value in results["settings"].items()
        if value is not None and name != unused
    )
    model = ((name.replace("_", " "), value) for name, value in results["model"].items())
    return [*given, *model, ("seconds in all", f"{results['total_seconds']:.0f}")]


def _facts(facts: Iterable[tuple[str, Any]]) -> str:
    rows = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts
    )
    return f'<table class="facts">{"".join(rows)}</table>'
