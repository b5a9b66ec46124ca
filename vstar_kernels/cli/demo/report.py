"""``report.html``: one file without links to anything, for light and dark screens."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vstar_kernels.cli.demo import charts
from vstar_kernels.cli.demo.page import facts, page, section
from vstar_kernels.cli.demo.summary import COLUMNS, cells


def render(results: dict[str, Any], videos: dict[str, Path]) -> str:
    """The page of :func:`vstar_kernels.cli.demo.summary.summarize`'s results and of the gifs."""
    body = "\n".join(
        [
            _head(results),
            section("Time, memory and agreement", _table(results), _table_notes(results)),
            section("Time in the temporal attention core", _bars(results, "core_seconds")),
            section("Time of a whole step", _bars(results, "step_seconds"), _step_note(results)),
            section("Temporal attention maps", _map_notes(), _maps(results)),
            section("Videos", _videos(videos)) if videos else "",
            section("Setting", facts(_setting(results))),
            section("Environment", facts(results["environment"].items())),
        ]
    )
    return page("vstar_kernels demo", body)


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
