"""What is checked of the node pack in a running ComfyUI, through its web API.

Each check is a function of a :class:`Run` that returns what it saw, in a few words; an
AssertionError or any other says that it is not so, and :class:`NotHereError` that it could not be
seen.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any
from zipfile import ZipFile

import torch
from PIL import Image

import vstar_kernels as vk
from tests.methods.chat_server import ChatServer, tells

from . import graphs, workflows
from .graphs import Graph, Link, Patch
from .run import (
    Made,
    NotHereError,
    Run,
    assert_differ,
    assert_formula,
    assert_relay,
    assert_rule,
    assert_same,
    both,
    difference,
    records,
)
from .server import KEY, PACK, FailedError

WINDOW = {"context_length": 8, "context_overlap": 2}
FREE_NOISE = {
    "batch_offset": 0,
    "noise_type": "FreeNoise",
    "seed_gen": "comfy",
    "seed_offset": 0,
}
CHECKS: dict[str, Callable[[Run], str]] = {}


def check(function: Callable[[Run], str]) -> Callable[[Run], str]:
    """Enters a function into the table of checks, under its docstring's first line."""
    CHECKS[(function.__doc__ or "").splitlines()[0].rstrip(".")] = function
    return function


# ---- the pack ----


@check
def has_nodes(run: Run) -> str:
    """The nodes are all there, each with a help page."""
    pages = {page.stem for page in (PACK / "web" / "docs").glob("*.md")}
    assert pages == set(run.ours), f"help pages {sorted(pages)}, nodes {sorted(run.ours)}"
    for name in pages:
        text = run.server.read(f"/extensions/{run.server.pack}/docs/{name}.md")
        assert text.startswith(b"# "), f"{name}: {text[:80]!r}"
    return f"{len(pages)} nodes"


@check
def has_templates(run: Run) -> str:
    """The example workflows are in the template browser, with a picture each."""
    listed = run.server.get("/workflow_templates")[run.server.pack]
    files = workflows.examples()
    assert files, "the pack has no example workflow"
    assert sorted(listed) == [file.stem for file in files]
    for file in files:
        assert file.with_suffix(".jpg").is_file(), f"{file.stem} has no picture"
        served = run.server.get(f"/api/workflow_templates/{run.server.pack}/{file.name}")
        assert served == workflows.read(file)
    return ", ".join(listed)


@check
def runs_examples(run: Run) -> str:
    """Every example workflow runs, at 64 pixels and else as it is."""
    shown = []
    for file in workflows.examples():
        prompt = workflows.shrink(workflows.as_prompt(workflows.read(file), run.nodes))
        run.server.placeholders(workflows.files(prompt))
        run.server.media(workflows.media(prompt))
        try:
            outputs = run.server.run(prompt)
        except FailedError as error:
            raise AssertionError(f"{file.stem}: {error}") from None
        shown.append(f"{file.stem} ({sum(map(len, outputs.values()))} results)")
    assert shown, "the pack has no example workflow"
    return ", ".join(shown)


@check
def passes_the_registry(run: Run) -> str:
    """The registry's own tool finds nothing: comfy node validate, comfy node pack."""
    comfy = shutil.which("comfy")
    if comfy is None:
        raise NotHereError("comfy-cli is not installed")
    folder = run.server.folder / "registry"
    shutil.copytree(PACK, folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "add", "-A"], check=True)
    said = ""
    for action in ("validate", "pack"):
        command = [comfy, "--skip-prompt", "--no-enable-telemetry", "node", action]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert "warning" not in said.lower(), said
    packed = next(folder.glob("*.zip"))
    names = ZipFile(packed).namelist()
    assert "check.py" not in names, names
    assert {"__init__.py", "pyproject.toml"} <= set(names), names
    return f"{packed.stat().st_size / 1024:.0f} KiB"


# ---- TAR ----

SIGMA = {0: 1.0, 1: 4.0}
HALF = {"end": 0.5, "sigma_level_1": SIGMA[1]}
BIASES = {level: vk.GaussianBias(sigma) for level, sigma in SIGMA.items()}


def check_strength(run: Run, make: Callable[[Patch], Made]) -> str:
    """Checks that strength 0 is the plain model, and strength 1 is not."""
    off = run.latents(make(run.tar(strength=0.0)))[0]
    on = run.latents(make(run.tar()))[0]
    plain = run.plain(make)
    return f"strength 0 {assert_same(off, plain)}, strength 1 apart {assert_differ(on, plain)}"


def check_formula(run: Run, make: Callable[[Patch], Made]) -> str:
    """Checks the paper's formula on what the model's own projections returned."""
    patch, folder = run.watched(run.tar(**HALF))
    run.latents(make(patch))
    return assert_formula(folder, BIASES, end=0.5)


def check_failure(run: Run, make: Callable[[Patch], Made], ours: Patch | None = None) -> str:
    """Checks that a sampler which fails in the middle leaves the model as it was."""
    plain = run.plain(make)
    said = run.fails(make(both(ours or run.tar(), run.node("VSTARTestFail"))))
    assert "fails on purpose" in said, said
    patch, _ = run.watched()
    again = run.latents(make(patch))[0]
    assert torch.equal(again, plain), f"they differ by {difference(again, plain):.1e}"
    return "the plain model again, bit for bit"


@check
def svd_strength(run: Run) -> str:
    """SVD: strength 0 is the plain model, strength 1 is not."""
    return check_strength(run, graphs.svd)


@check
def svd_formula(run: Run) -> str:
    """SVD: strength 1 is the formula, on the queries, keys and values of the model."""
    return check_formula(run, graphs.svd)


@check
def svd_failure(run: Run) -> str:
    """SVD: a sampler that fails leaves the model plain."""
    return check_failure(run, graphs.svd)


@check
def svd_branches(run: Run) -> str:
    """SVD: two branches of one graph, one under TAR, do not affect each other."""
    alone = run.latents(graphs.svd(run.tar(end=0.9)))[0]
    patch, _ = run.watched(run.tar(end=0.9))
    with_tar, without = run.latents(graphs.svd(patch, branches=2))
    assert torch.equal(with_tar, alone)
    assert torch.equal(without, run.plain(graphs.svd))
    assert_differ(with_tar, without)
    return "each is what it is alone, bit for bit"


@check
def svd_replaced(run: Run) -> str:
    """SVD: of two nodes VSTAR Apply TAR, the later counts."""
    patch = both(run.tar(strength=3.0), run.tar(strength=0.5))
    twice = run.latents(graphs.svd(patch))[0]
    once = run.latents(graphs.svd(run.tar(strength=0.5)))[0]
    return assert_same(twice, once)


def animatediff(run: Run, **options: Any) -> Callable[[Patch], Made]:
    """Returns the graph of AnimateDiff-Evolved, or skips where it is not installed."""
    if not run.server.has_animatediff:
        raise NotHereError("AnimateDiff-Evolved is not in custom_nodes")
    return lambda patch: graphs.animatediff(patch, **options)


@check
def animatediff_strength(run: Run) -> str:
    """AnimateDiff: strength 0 is the plain model, strength 1 is not."""
    return check_strength(run, animatediff(run))


@check
def animatediff_formula(run: Run) -> str:
    """AnimateDiff: strength 1 is the formula."""
    return check_formula(run, animatediff(run))


@check
def animatediff_failure(run: Run) -> str:
    """AnimateDiff: a sampler that fails leaves the model plain."""
    return check_failure(run, animatediff(run))


@check
def animatediff_order(run: Run) -> str:
    """AnimateDiff: TAR before Use Evolved Sampling is TAR behind it."""
    before = run.latents(animatediff(run, patch_first=True)(run.tar()))[0]
    return assert_same(before, run.latents(animatediff(run)(run.tar()))[0])


@check
def animatediff_windows(run: Run) -> str:
    """AnimateDiff: sliding context windows have the formula in each window."""
    return check_formula(run, animatediff(run, frames=20, context=WINDOW))


@check
def animatediff_freenoise(run: Run) -> str:
    """AnimateDiff: FreeNoise and sliding windows have the formula."""
    return check_formula(run, animatediff(run, frames=16, context=WINDOW, settings=FREE_NOISE))


@check
def animatediff_stretched(run: Run) -> str:
    """AnimateDiff: 48 frames in one pass, its positions stretched from 32, have the formula."""
    return check_formula(run, animatediff(run, frames=48, stretch=16))


# ---- rules between the frames of full-3D transformers ----

RULES = {
    "tar": vk.FrameRule.tar(1.0, 1.0),
    "attenuate": vk.FrameRule.attenuate(0.5, 1),
    "window": vk.FrameRule.window(1),
}


def check_full_3d(run: Run, file: str) -> str:
    """Checks every rule's formula, that strength 0 changes nothing, and a sampler that fails."""

    def make(patch: Patch) -> Made:
        return graphs.full_3d(file, patch)

    said = []
    for name, rule in RULES.items():
        inputs = {"rule": name, "alpha": 0.5, "window": 1, "end": 0.5}
        patch, folder = run.watched(run.node("VSTARApplyFrameRule", **inputs))
        on = run.latents(make(patch))[0]
        assert_differ(on, run.plain(make))
        ruled, total = assert_rule(folder, rule, end=0.5)
        said.append(f"{name} in {ruled} of {total} attentions")
    off = run.latents(make(run.node("VSTARApplyFrameRule", strength=0.0)))[0]
    same = assert_same(off, run.plain(make))
    check_failure(run, make, run.node("VSTARApplyFrameRule"))
    return f"{', '.join(said)}; strength 0 {same}; plain after a failure, bit for bit"


@check
def wan_rules(run: Run) -> str:
    """Wan: every rule is the formula, and leaves no trace."""
    return check_full_3d(run, graphs.WAN)


@check
def hunyuan_rules(run: Run) -> str:
    """HunyuanVideo: every rule is the formula, and leaves no trace."""
    return check_full_3d(run, graphs.HUNYUAN)


@check
def ltx_rules(run: Run) -> str:
    """LTX-Video: every rule is the formula, and leaves no trace."""
    return check_full_3d(run, graphs.LTX)


# ---- prompts over time in full-3D transformers ----

Prompts = Callable[[Graph, Link, Link], tuple[Link, Link]]  # from model and CLIP to model, positive
STAGES = "0: a candle is lit\n{begin}: a candle burns down to the end"
CLIP_TOKENS = 77  # of each text, from the tiny encoder; LTX's leaves out those that its mask hides
RELAY = vk.FrameRule.relay([(0, 0), (1, 2)], None, 0.5)  # of the stages' latent frames


def prompts(run: Run, file: str, **inputs: Any) -> Prompts:
    """Returns what puts VSTAR Apply Prompts over Time, for half of the steps, behind a model."""
    stages = STAGES.format(begin=8 if file == graphs.LTX else 4)
    inputs = {"prompt": "", "stages": stages, "end": 0.5, **inputs}

    def make(graph: Graph, model: Link, clip: Link) -> tuple[Link, Link]:
        ours = run.node("VSTARApplyPrompts", clip=clip, **inputs)(graph, model)
        return ours, [ours[0], 1]

    return make


def stage_tokens(file: str) -> list[int]:
    """Returns how many tokens each stage has: of LTX, its words and the two around them."""
    words = [len(line.split()) - 1 for line in STAGES.splitlines()]  # without its frame
    return [n + 2 for n in words] if file == graphs.LTX else [CLIP_TOKENS] * len(words)


def two_texts(graph: Graph, clip: Link) -> Link:
    """Makes a conditioning of as many tokens as two stages: ComfyUI has both sides in a batch."""
    parts = [text(words)(graph, clip) for words in ("blurry", "bad")]
    return graph.add("ConditioningConcat", conditioning_to=parts[0], conditioning_from=parts[1])


def check_sides(run: Run, file: str, negative: Callable[[Graph, Link], Link]) -> int:
    """Checks the formula of the stages, and that the negative side stays, bit for bit.

    It is compared in the first step, as the latents differ from then on. Returns how many
    attentions of the stages there were.
    """
    ours, results, negatives = prompts(run, file), [], []

    def off(graph: Graph, model: Link, clip: Link) -> tuple[Link, Link]:
        return model, ours(graph, model, clip)[1]

    ruled = 0
    for made in (ours, off):
        watched, folder = run.watched()
        results += run.latents(graphs.full_3d(file, watched, made, negative))
        if made is ours:
            ruled = assert_relay(folder, RELAY, stage_tokens(file), end=0.5)
        rows = {}
        for facts, found in records(folder):
            if facts["step"] == 0 and 1 in facts["sides"]:
                row = facts["sides"].index(1)
                rows |= {name: parts[-1][row] for name, parts in found.items()}
        assert rows, "no attention of the negative side was recorded"
        negatives.append(rows)
    assert_differ(*results)
    on, plain = negatives
    assert on.keys() == plain.keys()
    assert all(torch.equal(on[name], plain[name]) for name in on), "the negative side is changed"
    return ruled


def check_prompts(run: Run, file: str) -> str:
    """Checks the formula, beside a frame rule too, that it leaves no trace, and what must fail."""
    said = [f"{check_sides(run, file, text(''))} attentions"]
    if file != graphs.LTX:  # whose texts side by side would have the mask of one
        said.append(f"{check_sides(run, file, two_texts)} in one batch with the negative")
    ours = prompts(run, file)

    rule = run.node("VSTARApplyFrameRule", rule="window", window=1, end=0.5)
    watched, folder = run.watched(rule)
    run.latents(graphs.full_3d(file, watched, ours))
    assert_rule(folder, vk.FrameRule.window(1), end=0.5)
    said.append(f"{assert_relay(folder, RELAY, stage_tokens(file), end=0.5)} beside a frame rule")

    def make(patch: Patch) -> Made:
        return graphs.full_3d(file, patch)

    plain = run.plain(make)
    fails = run.fails(graphs.full_3d(file, run.node("VSTARTestFail"), ours))
    assert "fails on purpose" in fails, fails
    assert torch.equal(run.latents(make(run.watched()[0]))[0], plain)

    def other(graph: Graph, model: Link, clip: Link) -> tuple[Link, Link]:
        return ours(graph, model, clip)[0], text(DAY)(graph, clip)

    fails = run.fails(graphs.full_3d(file, graphs.plain, other))
    assert "positive must be the conditioning" in fails, fails
    fails = run.fails(graphs.full_3d(file, graphs.plain, ours, latent_frames=1))
    assert "stages must be as many as the video has latent frames at most, 1" in fails, fails
    return f"{', '.join(said)}; plain after a failure, bit for bit"


@check
def wan_prompts(run: Run) -> str:
    """Wan: prompts over time are the formula, and leave the negative side and no trace."""
    return check_prompts(run, graphs.WAN)


@check
def ltx_prompts(run: Run) -> str:
    """LTX-Video: prompts over time are the formula, and leave the negative side and no trace."""
    return check_prompts(run, graphs.LTX)


@check
def wan_prompts_in_windows(run: Run) -> str:
    """Wan: prompts over time in context windows are those of the video's frames."""
    inputs = {"context_length": 13, "context_overlap": 5, "context_schedule": "standard_static"}
    more = {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "freenoise": False}
    watched, folder = run.watched(run.node("WanContextWindowsManual", **inputs, **more))
    ours = prompts(run, graphs.WAN, stages="a candle\na torch\na fire")
    run.latents(graphs.full_3d(graphs.WAN, watched, ours, latent_frames=6))
    rule = vk.FrameRule.relay([(0, 1), (2, 3), (4, 5)], None, 0.5)
    ruled = assert_relay(folder, rule, [CLIP_TOKENS] * 3, end=0.5)
    windows = {tuple(facts["times"]) for facts, _ in records(folder)}
    assert len(windows) > 1, windows
    return f"in {ruled} attentions of {len(windows)} windows"


@check
def hunyuan_refuses_prompts(run: Run) -> str:
    """HunyuanVideo: prompts over time are an error that names the models that take them."""
    ours = prompts(run, graphs.HUNYUAN)
    said = run.fails(graphs.full_3d(graphs.HUNYUAN, graphs.plain, ours))
    assert "takes no HunyuanVideo as model: it is for Wan" in said, said
    return said


# ---- texts, maps, other videos ----

DAY, NIGHT = "a house in bright sunlight", "a house at night under stars"


def text(words: str) -> Callable[[Graph, Link], Link]:
    """Returns what makes the conditioning of one text."""
    return lambda graph, clip: graph.add("CLIPTextEncode", text=words, clip=clip)


def synopsis(run: Run, stages: str, frames: int) -> Callable[[Graph, Link], Link]:
    """Returns what makes the conditioning of a synopsis in which each text holds."""
    inputs = {"prompt": "", "stages": stages, "frames": frames, "mode": "hold"}
    return lambda graph, clip: graph.add("VSTARSynopsis", clip=clip, **inputs)


def check_texts(run: Run, make: Callable[..., Made], frames: int) -> str:
    """Checks that each frame is made of its own text, where frames do not see each other."""
    half = frames // 2
    texts = synopsis(run, f"0: {DAY}\n{half}: {NIGHT}", frames)
    both = run.latents(make(positive=texts))[0]
    day, night = (run.latents(make(positive=text(words)))[0] for words in (DAY, NIGHT))
    assert_differ(day[:half], night[:half])
    same = assert_same(torch.cat([day[:half], night[half:]]), both)
    return f"{half} frames of one text and {half} of another, {same}"


@check
def synopsis_of_pictures(run: Run) -> str:
    """Synopsis: each frame is made of its own text."""

    def make(**options: Any) -> Made:
        return graphs.images(graphs.plain, batch=6, **options)

    return check_texts(run, make, 6)


@check
def synopsis_in_windows(run: Run) -> str:
    """Synopsis: in AnimateDiff's context windows each frame keeps its own text."""
    animatediff(run)

    def make(**options: Any) -> Made:
        windows = {"frames": 20, "context": WINDOW, "effect": 0.0}
        return graphs.animatediff(graphs.plain, **windows, **options)

    return check_texts(run, make, 20)


@check
def writes_a_synopsis(run: Run) -> str:
    """Write Synopsis: a server on this machine is asked once, without the environment's key."""
    with ChatServer(tells("A bud.", "A rose.")) as chat:
        inputs = {"prompt": "a rose opens", "stages": 2, "server": chat.url, "model": "m"}
        graph = Graph()
        shown = graph.add("PreviewAny", source=graph.add("VSTARWriteSynopsis", **inputs))[0]
        outputs = run.server.run(graph)
        assert outputs[shown]["text"] == ["A bud.\nA rose."], outputs
        graph.add("PreviewAny", source=graph.add("StringTrim", string=["1", 0], mode="Both"))
        run.server.run(graph)
    assert len(chat.requests) == 1, f"it was asked {len(chat.requests)} times"
    assert KEY not in str(chat.headers), chat.headers
    return "asked once for two runs"


@check
def maps_change_nothing(run: Run) -> str:
    """Capture Maps: the video stays the same bit for bit, and the maps are drawn."""
    graph, (saver,) = graphs.svd(run.node("VSTARCaptureMaps", steps="0, 3", levels=""))
    maps = next(name for name, node in graph.items() if node["class_type"] == "VSTARCaptureMaps")
    latent = graph[saver]["inputs"]["samples"]
    shown = graph.add("VSTARShowMaps", maps=[maps, 1], latent=latent)[0]
    outputs = run.server.run(graph)
    assert torch.equal(run.server.latents(outputs, saver), run.plain(graphs.svd))
    (picture,) = run.server.saved(outputs, shown)
    return f"a picture of {' × '.join(map(str, Image.open(picture).size))}"


@check
def bias_of_a_video(run: Run) -> str:
    """Bias from Frames: the formula, with the similarity of the reference's frames."""
    colours = [(31 * frame, 255 - frame**2, 9 * frame) for frame in range(8)]

    def patch(graph: Graph, model: Link) -> Link:
        images = [
            graph.add("EmptyImage", width=16, height=16, batch_size=1, color=r << 16 | g << 8 | b)
            for r, g, b in colours
        ]
        frames = images[0]
        for image in images[1:]:
            frames = graph.add("ImageBatch", image1=frames, image2=image)
        inputs = {"embedder": "pixels", "min_max": True}
        bias = graph.add("VSTARBiasFromFrames", frames=frames, **inputs)
        return run.tar(bias=bias, end=0.5)(graph, model)

    patch, folder = run.watched(patch)
    run.latents(graphs.svd(patch))
    frames = torch.tensor(colours)[..., None, None].expand(-1, -1, 16, 16) / 255
    bias = vk.analysis.bias_from_frames(frames, min_max=True)
    return assert_formula(folder, {0: bias}, end=0.5)


# ---- what cannot be ----


@check
def refuses_pictures(run: Run) -> str:
    """A model without attention over frames is an error that says so."""
    said = run.fails(graphs.images(run.tar()))
    assert "temporal attention" in said, said
    return said


@check
def refuses_no_steps(run: Run) -> str:
    """A start behind the end is an error that names both."""
    said = run.fails(graphs.svd(run.tar(start=0.5, end=0.25)))
    assert "start, 0.5, must be before end, 0.25" in said, said
    return said


@check
def refuses_nothing(run: Run) -> str:
    """A configuration that regularizes nothing is an error."""
    said = run.fails(graphs.svd(run.tar(sigma_level_0=0.0)))
    assert "nothing is regularized" in said, said
    return said
