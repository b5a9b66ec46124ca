"""Pictures for the report, as text to put into HTML: SVG and base64 PNG, no file beside it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

# Nine points of matplotlib's viridis, dark to light.
PALETTE = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
NOT_FINITE = (128, 128, 128)
BAR_HEIGHT, ROW_HEIGHT, LABEL_WIDTH, CHART_WIDTH, VALUE_WIDTH = 20, 32, 190, 640, 90


def heat_map(matrix: Sequence[Sequence[float]], label: str) -> str:
    """An ``<img>`` of a matrix, one pixel for each element, from its minimum to its maximum.

    What is not finite is grey.
    """
    from PIL import Image

    values = [value for row in matrix for value in row]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    pixels = bytes(part for value in values for part in _colour((value - low) / span))
    image = Image.frombytes("RGB", (len(matrix[0]), len(matrix)), pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image_tag(buffer.getvalue(), "png", label)


def image_tag(content: bytes, kind: str, label: str) -> str:
    """An ``<img>`` that carries its content."""
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(label)}">'


def colour_bar() -> str:
    """The palette as a CSS gradient, from low to high."""
    return f"linear-gradient(to right, {', '.join(f'rgb{colour}' for colour in PALETTE)})"


def bars(rows: Sequence[tuple[str, float, str]], highlight: str) -> str:
    """An ``<svg>`` with a horizontal bar for each (label, value, text of the value)."""
    longest = max(value for _, value, _ in rows)
    room = CHART_WIDTH - LABEL_WIDTH - VALUE_WIDTH
    parts = []
    for index, (label, value, text) in enumerate(rows):
        top, length = index * ROW_HEIGHT, max(1.0, room * value / longest)
        middle = top + ROW_HEIGHT / 2
        css = "bar ours" if label == highlight else "bar"
        parts.append(
            f'<text x="{LABEL_WIDTH - 10}" y="{middle}" class="label">{html.escape(label)}</text>'
            f'<rect x="{LABEL_WIDTH}" y="{top + (ROW_HEIGHT - BAR_HEIGHT) / 2}" rx="2"'
            f' width="{length:.1f}" height="{BAR_HEIGHT}" class="{css}"/>'
            f'<text x="{LABEL_WIDTH + length + 8:.1f}" y="{middle}">{html.escape(text)}</text>'
        )
    height = len(rows) * ROW_HEIGHT
    return f'<svg viewBox="0 0 {CHART_WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _colour(share: float) -> tuple[int, ...]:
    """The palette at ``share`` of 1, interpolated."""
    if not math.isfinite(share):
        return NOT_FINITE
    position = share * (len(PALETTE) - 1)
    index = min(int(position), len(PALETTE) - 2)
    rest = position - index
    return tuple(
        round(low + rest * (high - low))
        for low, high in zip(PALETTE[index], PALETTE[index + 1], strict=True)
    )
