"""``vstar-kernels generate --method starvid`` from its command line to its page."""

import json
from dataclasses import replace

import pytest

import vstar_kernels as vk
from vstar_kernels.cli.main import main

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from tests.browser import HOSTILE
from tests.methods.starvid.pipelines import PLAN, PROMPT

pytestmark = [
    pytest.mark.usefixtures("one_thread", "wide_terminal"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
FILES = {"video.mp4", "video.gif", "report.html", "generation.json", "plan.json", "guidance.json"}
CONFIG = vk.GuidanceConfig(spatial=(0, 0.5), syntax=(0.5, 1), updates=1, step_size=100.0)


@pytest.fixture
def generate(model, tmp_path, capsys):
    """Run the command with a small video; its exit status and what it printed."""

    def run(*arguments):
        given = ["--model", model, "--output", tmp_path / "out", "--frames", 2, "--steps", 2]
        status = main(["generate", *map(str, given), *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_everything(generate, tmp_path):
    plan = replace(PLAN, background=HOSTILE)
    plan.save(tmp_path / "plan.json")
    CONFIG.save(tmp_path / "guidance.json")
    options = ["--method", "starvid", "--plan", tmp_path / "plan.json", "--seed", 3]
    options += ["--size", "16x16", "--guidance", tmp_path / "guidance.json"]
    status, printed = generate(*options, "--preset", "8D1_4D8")
    assert status == 0, printed
    assert "seed 3, 2 updates of the latents" in printed
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == FILES | {"config.json"}
    record = json.loads((output / "generation.json").read_text())
    assert (record["method"], record["seed"], record["frames"]) == ("starvid", 3, 2)
    assert [update["step"] for update in record["updates"]] == [0, 1]
    assert vk.Trajectory.load(output / "plan.json") == plan
    assert vk.GuidanceConfig.load(output / "guidance.json") == CONFIG
    page = (output / "report.html").read_text(encoding="utf-8")
    for part in ("The plan over the video", "Guidance", "while the latents are guided", "Step 1."):
        assert part in page
    assert HOSTILE not in page
    assert "<script" not in page
    assert page.count("data:image/svg+xml;base64,") == 2 + 2 + 2  # plan, losses; maps of 2 steps

    # By another method, nothing of it is left; and the frames differ.
    guided = (output / "video.gif").read_bytes()
    plain = ["--prompt", PROMPT, "--no-tar", "--no-maps", "--seed", 3, "--size", "16x16"]
    assert generate(*plain, "--overwrite")[0] == 0
    assert not FILES & {"report.html", "plan.json"} & {path.name for path in output.iterdir()}
    assert (output / "video.gif").read_bytes() != guided


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "starvid"], "--prompt or --plan must be given"),
        (["--method", "starvid", "--prompt", "p"], "needs --plan, or a writer of plans"),
        (
            ["--method", "starvid", "--plan", "{good}", "--mode", "hold"],
            "--mode is for --method vstar, not for starvid",
        ),
        (
            ["--method", "starvid", "--plan", "{good}", "--rounding", "nearest"],
            "--rounding is for --method vstar, not for starvid",
        ),
        (
            ["--method", "starvid", "--plan", "x", "--writer", "m", "--prompt", "p"],
            "give one of them",
        ),
        (["--method", "starvid", "--writer", "m", "--plan", "x"], "give one of them"),
        (["--method", "starvid", "--plan", "x", "--key-frames", "3"], "--key-frames is for a wri"),
        (["--method", "starvid", "--plan", "none.json"], "--plan: "),
        (["--method", "starvid", "--plan", "{bad}"], "--plan: not a plan: subjects: it is missing"),
        (
            ["--method", "starvid", "--plan", "{good}", "--guidance", "{bad}"],
            "--guidance: prompt: there is no such field",
        ),
        (["--method", "starvid", "--plan", "{good}", "--prompt", "other"], "--plan: no plan of"),
        (["--method", "starvid", "--plan", "{other}"], "'cat' is not in the prompt 'a dog'"),
        (["--plan", "{good}", "--prompt", "p"], "--plan is for --method starvid, not for vstar"),
        (
            ["--method", "starvid", "--plan", "{good}", "--synopsis", "x"],
            "--synopsis is for --method vstar, not for starvid",
        ),
    ],
)
def test_what_it_refuses(generate, tmp_path, arguments, message):
    PLAN.save(tmp_path / "good.json")
    vk.Trajectory("a dog", [PLAN.subjects[0]]).save(tmp_path / "other.json")
    (tmp_path / "bad.json").write_text('{"prompt": "p"}')
    names = {name: str(tmp_path / f"{name}.json") for name in ("good", "bad", "other")}
    status, printed = generate(*(argument.format(**names) for argument in arguments))
    assert status == 2
    assert message in printed
    assert not (tmp_path / "out").exists()


def test_updates_that_are_not_made_are_not_counted(generate, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    replace(CONFIG, stop_below=1e9).save(tmp_path / "guidance.json")
    options = ["--method", "starvid", "--plan", tmp_path / "plan.json", "--size", "16x16"]
    options += ["--guidance", tmp_path / "guidance.json", "--no-maps", "--seed", 3]
    status, printed = generate(*options)
    assert status == 0, printed
    assert "seed 3, 0 updates of the latents" in printed
    record = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert [update["applied"] for update in record["updates"]] == [False, False]
    assert not {"mode", "rounding"} & record.keys()
