"""Runs diffusers' own tests of its video models and pipelines, as they are and under TAR.

    git clone --branch v0.40.0 https://github.com/huggingface/diffusers
    python tools/diffusers_tests.py diffusers [--jobs 2] [-k EXPRESSION]

The tests and the diffusers that they test are those of the folder. Under TAR, ``apply_tar`` with
strength 0 is called on every model with temporal attention as soon as it is made: its attention is
computed by vstar_kernels and is to be what it was. A table says what passes; tests that pass
without and not under TAR are listed, and there being one is exit status 1. It needs pytest-xdist
and what diffusers' tests import: httpx, parameterized, requests_mock.

Both ways, perturbed attention guidance has spatial layers for its default, as TAR's error asks for:
diffusers' default takes motion modules too, and of these TAR says that it cannot share them.
Nothing is downloaded: in the place of the hub's tiny tokenizers come others that are made here, so
that tests which compare with recorded numbers of a pipeline may fail, both ways.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import string
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET  # of reports that pytest writes here  # nosec B405
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Those that a version of diffusers has; it removed those of the deprecated pipelines in July 2025.
PLACES = (
    "models/unets/test_models_unet_3d_condition.py",
    "models/unets/test_models_unet_motion.py",
    "models/unets/test_models_unet_spatiotemporal.py",
    "models/transformers/test_models_transformer_latte.py",
    "pipelines/text_to_video_synthesis/test_text_to_video.py",
    "pipelines/text_to_video_synthesis/test_video_to_video.py",
    "pipelines/i2vgen_xl",
    "pipelines/animatediff",
    "pipelines/pag/test_pag_animatediff.py",
    "pipelines/pia",
    "pipelines/stable_video_diffusion",
    "pipelines/latte",
)
MODELS = (
    "UNet3DConditionModel",
    "I2VGenXLUNet",
    "UNetMotionModel",
    "SparseControlNetModel",
    "UNetSpatioTemporalConditionModel",
    "LatteTransformer3DModel",
)
VARIABLE = "VSTAR_KERNELS_DIFFUSERS_TESTS"  # "tar" under TAR: this file is pytest's plugin, too
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
HUB = "hf-internal-testing/"  # tiny-random-clip and tiny-random-t5


# ---- in pytest: the plugin ----

calls = 0  # of attention under TAR


def pytest_configure(config: pytest.Config) -> None:
    """Makes the tests independent of the hub and, if asked to, puts TAR on every model."""
    _make_tokenizers_here()
    _keep_perturbed_attention_spatial()
    if os.environ.get(VARIABLE) == "tar":
        _put_tar_on_every_model()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has the tests of deprecated pipelines run, where there are any: they skip by a class."""
    from diffusers.pipelines import pipeline_utils

    if hasattr(pipeline_utils, "DeprecatedPipelineMixin"):
        pipeline_utils.DeprecatedPipelineMixin = type("NoPipeline", (), {})


@pytest.fixture(autouse=True)
def _count_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    before = calls
    yield
    request.node.user_properties.append(("calls", calls - before))


def _put_tar_on_every_model() -> None:
    import diffusers

    import vstar_kernels as vk
    from vstar_kernels.models.attention_processor import TARAttnProcessor
    from vstar_kernels.models.front_end import temporal_layers

    def regularized(init: Any) -> Any:
        @functools.wraps(init)
        def run(model: Any, *args: Any, **kwargs: Any) -> None:
            init(model, *args, **kwargs)
            levels = {x.level for x in temporal_layers(model)} - {"init"}
            sigma: Any = dict.fromkeys(levels, 1.0)
            vk.apply_tar(model, vk.TARConfig(sigma, strength=0.0, steps=None, include_init=True))

        return run

    def counted(call: Any) -> Any:
        # With its signature, from which diffusers takes the names of arguments.
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            global calls
            calls += 1
            return call(*args, **kwargs)

        return run

    for name in MODELS:
        model: Any = getattr(diffusers, name)
        model.__init__ = regularized(model.__init__)
    processor: Any = TARAttnProcessor
    processor.__call__ = counted(processor.__call__)


def _keep_perturbed_attention_spatial() -> None:
    import diffusers

    pipeline: Any = diffusers.AnimateDiffPAGPipeline
    init = pipeline.__init__

    @functools.wraps(init)
    def run(*args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("pag_applied_layers", "mid_block.attentions.*attn1")
        init(*args, **kwargs)

    pipeline.__init__ = run


def _make_tokenizers_here() -> None:
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(x, -3.0) for x in LETTERS + string.ascii_uppercase]
    tiny = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 5, "num_heads": 4}
    made = {
        "CLIPTokenizer": _clip_tokenizer,
        "AutoTokenizer": lambda load: transformers.T5Tokenizer(vocab=pieces, extra_ids=0),
        "AutoConfig": lambda load: transformers.T5Config(vocab_size=1103, **tiny),
    }
    for name, make in made.items():
        kind: Any = getattr(transformers, name)
        kind.from_pretrained = classmethod(_of_hub(kind.from_pretrained.__func__, make))


def _of_hub(load: Any, make: Callable[[Any], Any]) -> Any:
    @functools.wraps(load)
    def run(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if str(name).startswith(HUB):
            return make(functools.partial(load, cls))
        return load(cls, name, *args, **kwargs)

    return run


def _clip_tokenizer(load: Callable[[str], Any]) -> Any:
    """Returns a tokenizer of letters, by files, which transformers 4 and 5 both read."""
    words = ["<|startoftext|>", "<pad>", "<|endoftext|>", *LETTERS, *(x + "</w>" for x in LETTERS)]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    config["pad_token"] = words[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({x: i for i, x in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load(name)


# ---- the command ----


@dataclass(frozen=True)
class Result:
    """What became of a test: "passed", "failed" or "skipped", its message, its calls under TAR."""

    outcome: str
    message: str
    calls: int


Results = dict[tuple[str, str], Result]  # by the test's class, with its module, and its name


def main() -> int:
    """Runs the tests both ways and prints the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("folder", type=Path, help="a checkout of diffusers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at a time")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="as pytest's")
    options = parser.parse_args()
    folder = options.folder.resolve()
    places = [f"tests/{x}" for x in PLACES if (folder / "tests" / x).exists()]
    if not places:
        parser.error(f"{folder} has none of diffusers' tests of video models")
    print(f"diffusers {_version(folder)}\n", flush=True)
    stock, under = (_run(folder, places, options.jobs, options.k, way) for way in ("stock", "tar"))
    print(_table(stock, under))
    unread = [x for x in stock if not x[0] and stock[x].outcome == "failed"]
    print("".join(f"\n{x[1]} cannot be imported: {stock[x].message}" for x in unread))
    broken = [x for x in stock if stock[x].outcome == "passed" and not _passes(under, x)]
    print(f"\n{len(broken)} tests pass without TAR and not under it.")
    for place in broken:
        found = under.get(place)
        print(f"- {'::'.join(place)}: {found.message if found else 'it did not run'}")
    return 1 if broken else 0


class _Plain(argparse.RawDescriptionHelpFormatter):
    """The file's own lines."""


def _version(folder: Path) -> str:
    text = (folder / "src/diffusers/__init__.py").read_text(encoding="utf-8")
    version = text.split('__version__ = "')[1].split('"')[0]
    command = ["git", "-C", folder, "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{version}, commit {commit or 'unknown'}"


def _run(folder: Path, places: list[str], jobs: int, chosen: str, way: str) -> Results:
    with tempfile.TemporaryDirectory() as output:
        report = Path(output) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "--quiet"]
        command += ["--numprocesses", str(jobs), "--dist", "worksteal", "-p", "no:cacheprovider"]
        command += ["--tb=no", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        paths = [folder / "src", Path(__file__).parent, ROOT, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            VARIABLE: way,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        }
        command += [*(["-k", chosen] if chosen else []), *places]
        subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr)
        return _read(report)


def _read(report: Path) -> Results:
    results = {}
    for case in ET.parse(report).getroot().iter("testcase"):  # nosec B314
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = " ".join((child.get("message") or "").split())[:200]
        ran = [int(x.get("value", 0)) for x in case.iter("property") if x.get("name") == "calls"]
        place = (case.get("classname", ""), case.get("name", ""))
        results[place] = Result(outcome, message, sum(ran))
    return results


def _passes(results: Results, place: tuple[str, str]) -> bool:
    return place in results and results[place].outcome == "passed"


def _table(stock: Results, under: Results) -> str:
    """Returns a table of what passes, a line for each file of tests."""
    rows: dict[str, Counter[str]] = {}
    for place, result in stock.items():
        # Of a file that cannot be imported there is one case, named after it and without a class.
        words = ".".join(place).split(".")
        module = next(x for x in words if x.startswith("test_"))
        row = rows.setdefault(module, Counter())
        row["tests"] += result.outcome != "skipped"
        row["stock"] += result.outcome == "passed"
        row["tar"] += _passes(under, place)
        row["ran"] += _passes(under, place) and under[place].calls > 0
        row["broken"] += result.outcome == "passed" and not _passes(under, place)
    rows["all"] = sum(rows.values(), Counter())
    lines = [
        "| file | tests that run | pass | pass under TAR | of which it computes in | broken |",
        "|---|---|---|---|---|---|",
    ]
    fields = ("tests", "stock", "tar", "ran", "broken")
    lines += [f"| {x} | {' | '.join(str(row[y]) for y in fields)} |" for x, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
