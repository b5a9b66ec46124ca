"""ComfyUI's page in Chromium: the example workflows by their templates, and the help pages."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser import NAMES

from . import workflows
from .run import NotHereError, Run
from .server import FailedError, failure

VIEW = {"width": 2000, "height": 1050}
PICTURE, CARD = 1400, 512  # widths in pixels
# No tour of the page and no map of the graph; texts also where the graph is small.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
# Sets widths and heights to a number of pixels, and returns what they were.
RESIZE = """(sizes) => {
  const before = {};
  for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
    if (["width", "height"].includes(widget.name)) {
      const place = `${node.id}:${widget.name}`;
      before[place] = widget.value;
      widget.value = sizes[place] ?? sizes.all ?? widget.value;
    }
  app.graph.setDirtyCanvas(true, true);
  return before;
}"""
SHOWN = """() => app.graph.nodes.filter(
  node => node.imgs?.length && node.imgs.every(image => image.complete && image.naturalWidth)
).map(node => node.type)"""
BOTTOM = """() => Math.max(...app.graph.nodes.map(node =>
  (node.pos[1] + node.size[1] + app.canvas.ds.offset[1]) * app.canvas.ds.scale
)) + app.canvas.canvas.getBoundingClientRect().top"""
OUTPUTS = "() => app.graph.nodes.filter(n => n.constructor.nodeData?.output_node).length"


@contextmanager
def page_of(run: Run) -> Iterator[tuple[Any, list[str]]]:
    """Opens ComfyUI's page, and yields it with the errors of its scripts as they come."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise NotHereError("Playwright is not installed: pip install playwright") from None
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        raise NotHereError(f"none of {', '.join(NAMES)} is installed")
    run.server.post("/settings", SETTINGS)
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.route(lambda url: not url.startswith(run.server.url), lambda route: route.abort())
        page.goto(run.server.url)
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager")
        page.get_by_test_id("queue-button").wait_for()
        yield page, errors
        browser.close()


def open_template(page: Any, pack: str, name: str) -> None:
    """Opens an example workflow as users do, from the page's template browser."""
    dialog = page.get_by_role("dialog")
    page.get_by_role("button", name="Templates").click()
    dialog.get_by_text(pack, exact=True).click()
    dialog.get_by_text(name, exact=True).click()
    dialog.wait_for(state="hidden")
    page.wait_for_function("() => app.graph.nodes.some(n => n.type.startsWith('VSTAR'))")


def press_run(run: Run, page: Any, seconds: float = 300) -> None:
    """Presses the button Run, and waits until the job is completed and its results are shown."""
    before = set(run.server.get("/history"))
    page.get_by_test_id("queue-button").click()
    end = time.monotonic() + seconds
    while not (jobs := run.server.get("/history").keys() - before):
        assert time.monotonic() < end, f"nothing ran:\n{run.server.tail()}"
        time.sleep(0.2)
    status = run.server.get(f"/history/{jobs.pop()}")
    for job in status.values():
        if not job["status"]["completed"]:
            raise FailedError(failure(job["status"]["messages"]))
    page.wait_for_function(f"() => ({SHOWN})().length >= ({OUTPUTS})()")


def picture(page: Any) -> Image.Image:
    """Returns the page with the whole graph in view, down to the last node."""
    page.evaluate("() => app.canvas.deselectAll()")
    page.mouse.move(VIEW["width"] / 2, VIEW["height"] - 20)
    page.get_by_role("button", name="Fit View").click()
    time.sleep(1)  # for the view to arrive there
    clip = {"x": 0, "y": 0, "width": VIEW["width"], "height": page.evaluate(BOTTOM) + 30}
    return Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB")


def save(image: Image.Image, width: int, file: Path, *, most: int = 200_000) -> None:
    """Writes a picture of a width as a JPEG of so many bytes at most."""
    height = round(image.height * width / image.width)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    for quality in range(90, 30, -5):
        small.save(file, quality=quality, optimize=True)
        if file.stat().st_size <= most:
            return
    raise AssertionError(f"{file} is too large")


def opens_templates(run: Run) -> str:
    """The page: each example opens from its template, runs, and shows its results."""
    shown = []
    for file in workflows.examples():
        prompt = workflows.as_prompt(workflows.read(file), run.nodes)
        run.server.placeholders(workflows.files(prompt))
        run.server.media(workflows.media(prompt))
    with page_of(run) as (page, errors):
        for file in workflows.examples():
            open_template(page, run.server.pack, file.stem)
            sizes = page.evaluate(RESIZE, {"all": 64})
            press_run(run, page)
            page.evaluate(RESIZE, sizes)
            assert not errors, f"{file.stem}: {errors}"
            shown.append(f"{file.stem} ({', '.join(page.evaluate(SHOWN))})")
            if run.pictures:
                image = picture(page)
                save(image, PICTURE, run.pictures / f"comfyui-{file.stem}.jpg")
                save(image, CARD, file.with_suffix(".jpg"), most=50_000)
    return "; ".join(shown)


def opens_help(run: Run) -> str:
    """The page: each node's help opens, with its own text."""
    with page_of(run) as (page, errors):
        for name in run.ours:
            page.evaluate(
                """(name) => {
                  app.graph.clear();
                  const node = LiteGraph.createNode(name);
                  node.pos = [200, 200];
                  app.graph.add(node);
                  app.canvas.selectNode(node);
                }""",
                name,
            )
            page.get_by_test_id("info-button").click()
            text = (workflows.PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
            heading = text.splitlines()[0].removeprefix("# ")
            page.get_by_role("heading", name=heading).first.wait_for()
            if run.pictures and name == "VSTARApplyTAR":
                image = Image.open(BytesIO(page.screenshot())).convert("RGB")
                save(image, PICTURE, run.pictures / "comfyui-help.jpg")
        assert not errors, errors
    return f"{len(run.ours)} pages"


CHECKS: dict[str, Callable[[Run], str]] = {
    (function.__doc__ or "").rstrip("."): function for function in (opens_templates, opens_help)
}
