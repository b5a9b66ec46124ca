"""``vstar-kernels generate --prompts`` from its file to its folders, on a tiny pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vstar_kernels as vk
from vstar_kernels.cli.main import main

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
import numpy as np

from tests.methods.starvid.pipelines import PLAN
from vstar_kernels.cli.generate import batch
from vstar_kernels.cli.generate.prompts import read_prompts
from vstar_kernels.cli.options import CommandError

pytestmark = [
    pytest.mark.usefixtures("one_thread", "wide_terminal"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
SMALL = ("--frames", 2, "--steps", 2, "--size", "16x16", "--no-maps")
TAR = {"sigma": {"0": 2.0}, "steps": None}
ROOT = Path(__file__).resolve().parents[2]
CONFIG = vk.GuidanceConfig(updates=1)


@pytest.fixture
def generate(model, tmp_path, capsys):
    """Run the command on lines, objects or texts; its exit status and what it printed."""

    def run(lines, *arguments, output="out"):
        text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
        (tmp_path / "prompts").write_text(text)
        given = ["--model", model, "--prompts", tmp_path / "prompts", *SMALL]
        given += ["--output", tmp_path / output, *arguments]
        status = main(["generate", *map(str, given)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def index(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def test_a_file_of_videos(generate, tmp_path, model, capsys):
    lines = [
        {"prompt": "a kite", "seed": 1, "config": TAR, "keep_frames": True},
        {"prompt": "a dog", "preset": "999D1"},
        {"name": "stages", "prompt": "a dog", "synopsis": ["a dog sits", "a dog runs"], "seed": 2},
        {"plan": json.loads(PLAN.to_json()), "method": "starvid", "no_tar": True, "seed": 3}
        | {"guidance": json.loads(CONFIG.to_json()), "steps": 1},
    ]
    status, printed = generate(lines, "--preset", "8D1")
    assert status == 1, printed
    assert "[1/4] 001-a-kite: done, " in printed
    assert "3 made, 0 there already, 1 failed: " in printed
    assert "  2: a dog: no temporal attention has width 999: the widths are 4, 8" in printed
    found = index(tmp_path / "out")
    folders = ["001-a-kite", None, "003-stages", "004-a-red-cat-jumps-over-a-small-dog"]
    assert [x.get("folder") for x in found][:3] == folders[:3]
    assert [x.get("seed") for x in found] == [1, None, 2, 3]
    assert vk.TARConfig.load(tmp_path / "out/001-a-kite/config.json").sigma == {0: 2.0}
    assert vk.TARConfig.load(tmp_path / "out/003-stages/config.json").by_width == {8: 1.0}
    record = json.loads((tmp_path / "out/003-stages/generation.json").read_text())
    assert record["synopsis"]["stages"] == ["a dog sits", "a dog runs"]
    starvid = tmp_path / "out" / found[3]["folder"]
    assert (starvid / "report.html").exists()
    assert vk.Trajectory.load(starvid / "plan.json") == PLAN
    with np.load(tmp_path / "out/001-a-kite/frames.npz") as arrays:
        frames = arrays["frames"]
    assert (frames.shape, frames.dtype) == ((2, 16, 16, 3), np.uint8)

    # The same as by itself.
    (tmp_path / "config.json").write_text(json.dumps(TAR))
    alone = ["--model", model, "--prompt", "a kite", "--seed", 1, *SMALL, "--output"]
    alone += [tmp_path / "alone", "--config", tmp_path / "config.json", "--keep-frames"]
    assert main(["generate", *map(str, alone)]) == 0
    for name in ("video.gif", "video.mp4", "config.json"):
        both = [tmp_path / folder / name for folder in ("alone", "out/001-a-kite")]
        assert both[0].read_bytes() == both[1].read_bytes()
    capsys.readouterr()

    # Only what failed is made again, and where nothing is left, nothing is loaded.
    lines[1] = {"prompt": "a dog", "seed": 5}
    status, printed = generate(lines, "--preset", "8D1", "--device", "cpu")
    assert (status, "1 made, 3 there already, 0 failed" in printed) == (0, True), printed


def test_lines_end_where_json_lines_do(generate, monkeypatch):
    jobs = []
    monkeypatch.setattr(
        "vstar_kernels.cli.generate.command.make_all",
        lambda found, *_, **__: jobs.extend(found) or [],
    )
    text = "a kite\u2028a dog"
    status, printed = generate([json.dumps({"prompt": text}, ensure_ascii=False) + "\r"])
    assert (status, [job.name for job in jobs]) == (0, [text]), printed


def test_a_lines_tar_takes_the_place_of_the_commands(generate, monkeypatch):
    """With the command's changes of it; and what changes nothing is not in a job's key."""
    jobs = []
    monkeypatch.setattr(
        "vstar_kernels.cli.generate.command.make_all",
        lambda found, *_, **__: jobs.extend(found) or [],
    )
    by_level = {"0": 1, "1": 8}
    lines = [{}, {"no_tar": True}, {"preset": "8D1"}, {"strength": 3}, {"sigma": by_level}]
    given = [{"prompt": "a kite", **line} for line in lines]
    status, printed = generate(given, "--sigma", 2)
    assert status == 0, printed
    assert [job.task.regularization.sigma for job in jobs] == [2, None, None, 2, {"0": 1, "1": 8}]
    assert ["sigma" in job.key for job in jobs] == [True, False, False, True, True]
    assert not {"strength", "tar_steps"} & set(jobs[0].key)
    jobs.clear()
    configs = [{"sigma": 1}, {"sigma": 1.0, "strength": 1}, {"sigma": 1, "layers": None}]
    status, printed = generate([{"prompt": "a kite", "config": x} for x in configs])
    assert status == 0, printed
    keys = [job.key["config"] for job in jobs]
    assert keys[0] == keys[1] == json.loads(vk.TARConfig(1.0).to_json())
    assert keys[2] == json.loads(vk.FrameTAR(1.0).to_json())


def test_nothing_is_loaded_for_nothing(generate, tmp_path, monkeypatch):
    status, printed = generate(["a kite", "", "  a dog "])
    assert status == 0, printed
    folders = ["001-a-kite", "002-a-dog"]
    assert [x["folder"] for x in index(tmp_path / "out")] == folders
    monkeypatch.setattr(batch, "load_pipeline", None)
    status, printed = generate(["a kite", "a dog"])
    assert status == 0, printed
    assert "0 made, 2 there already, 0 failed" in printed


def test_an_interruption(generate, tmp_path, monkeypatch):
    write = batch.write_files

    def interrupted(folder, options, *rest, **more):
        if options.video.prompt == "b":
            raise KeyboardInterrupt
        write(folder, options, *rest, **more)

    monkeypatch.setattr(batch, "write_files", interrupted)
    status, printed = generate(["a", "b", "c"])
    assert status == 130
    assert "generate: interrupted; 1 of 3 are done; the same command goes on" in printed
    assert [x.name for x in sorted((tmp_path / "out").glob("*-*"))] == ["001-a"]
    monkeypatch.undo()
    status, printed = generate(["a", "b", "c"])
    assert (status, "2 made, 1 there already" in printed) == (0, True)


def test_errors_that_may_pass_are_tried_again(generate, monkeypatch):
    tries = []

    def unlucky(*_, **__):
        tries.append(1)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(batch, "write_files", unlucky)
    status, printed = generate(["a"], "--retries", 2)
    assert (status, len(tries)) == (1, 3)
    assert "a: failed: RuntimeError: out of luck" in printed


def test_what_decides_a_video(generate, tmp_path, monkeypatch):
    """Contents of files do, their names do not; nor where and how it is made."""
    PLAN.save(tmp_path / "plan.json")
    base = ["--method", "starvid"]
    plan, same = {"plan": "plan.json", "seed": 1}, {"plan": "same.json", "seed": 1}
    keys = []
    monkeypatch.setattr(
        "vstar_kernels.cli.generate.command.make_all",
        lambda jobs, *_, **__: keys.append(jobs[0].key) or [],
    )
    generate([plan], *base)
    PLAN.save(tmp_path / "same.json")
    generate([same], *base, "--device", "cpu", output="other")
    assert keys[0] == keys[1]
    (tmp_path / "same.json").write_text("[]")
    generate([same], *base)
    generate([plan | {"seed": 2}], *base)
    generate([plan | {"frames": 3}], *base)
    generate([plan], *base, "--fps", 9)
    generate([{"plan": json.loads(PLAN.to_json()), "seed": 1}], *base)
    generate([{"plan": "nowhere.json", "seed": 1}], *base)  # it fails alone
    # A server alone is a writer, too; which model writes decides, where it is does not.
    plain = {"prompt": "p", "seed": 1}
    generate([plain])
    for model in ("one", "other"):
        monkeypatch.setenv("OPENAI_MODEL", model)
        generate([plain], "--writer-url", "http://here")
    generate([plain], "--writer-url", "http://there")
    assert keys.pop() == keys[-1]
    assert all(keys[i] != keys[j] for i in range(1, len(keys)) for j in range(1, i))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "p", "seed": -1}, "seed must be an integer of at least 0, at most"),
        ({"prompt": "p", "seed": 1.5}, "seed must be an integer of at least 0, at most"),
        ({"prompt": "p", "frames": [2]}, "frames must be no list, got [2]"),
        ({"prompt": "p", "map_steps": 2}, "map_steps must be a list, got 2"),
        ({"prompt": "p", "map_steps": [2]}, "--map-steps must be below --steps, 2, got 2"),
        ({"prompt": "p", "map_steps": [0], "no_maps": True}, "map_steps and no_maps exclude"),
        ({"prompt": "p", "sead": 1}, "there is no option 'sead'; there are method, prompt, neg"),
        ({"prompt": "p", "model": "m"}, "model is one for all videos: give the command --model"),
        ({"prompt": 3}, "prompt must be a text, got 3"),
        ({"prompt": " "}, "--prompt must not be empty"),
        ({"seed": 3}, "--prompt or --synopsis must be given"),
        ({"prompt": "p", "no_tar": 1}, "no_tar must be true or false, got 1"),
        ({"prompt": "p", "no_tar": True, "preset": "8D1"}, "preset and no_tar exclude each other"),
        ({"prompt": "p", "preset": "64"}, "--preset: a preset must be <width>D<sigma>, joined"),
        ({"prompt": "p", "mode": "cubic"}, "mode must be one of 'linear', 'slerp', 'hold', got"),
        ({"prompt": "p", "image": 3}, "image must be the name of a file, got 3"),
        ({"prompt": "p", "size": "15x16"}, "size must be HEIGHTxWIDTH in multiples of 8"),
        ({"prompt": "p", "config": {"sigma": -1}}, "config is wrong: "),
        ({"prompt": "p", "config": "no file"}, "--config "),
        ({"prompt": "p", "config": "prompts"}, "--config "),
        ({"prompt": "p", "sigma": -1}, "sigma must be a finite number of at least 0, or"),
        ({"prompt": "p", "synopsis": {"prompt": "p"}}, "synopsis is wrong: not a synopsis: stages"),
        ({"synopsis": ["a"]}, "synopsis is wrong: as a list of stages needs prompt"),
        ({"prompt": "p", "plan": {}}, "plan is wrong: "),
        ({"prompt": "p", "name": ""}, "name must be a text, got ''"),
        ({"prompt": "p", "rows": 2}, "--rows is for --method grid, not for vstar"),
        ('{"prompt": "p"', "it is not JSON: "),
        ("[1]", "a line must be a JSON object, got [1]"),
    ],
)
def test_a_wrong_line_is_found_before_loading(generate, tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(batch, "load_pipeline", None)
    status, printed = generate([{"prompt": "right"}, "", line])
    assert status == 2
    assert f"generate: error: --prompts: {tmp_path / 'prompts'}, line 3: {message}" in printed
    assert not (tmp_path / "out").exists()


def test_wrong_commands(generate, tmp_path):
    status, printed = generate([""])
    assert (status, "must have 1 to 100000 lines, has no line with a prompt" in printed) == (
        2,
        True,
    )
    status, printed = generate(["a"], "--prompt", "b")
    assert (status, "--prompt is for one video, --prompts for many" in printed) == (2, True)
    status, printed = generate(["a"], "--overwrite")
    assert (status, "--overwrite is for one video" in printed) == (2, True)
    (tmp_path / "file").write_text("")
    status, printed = generate(["a"], output="file")
    assert (status, "generate: error: --output: " in printed) == (2, True)


@pytest.mark.parametrize("name", ["list.json", "list.CSV", "list.yaml"])
def test_files_that_have_no_prompt_a_line(tmp_path, name):
    (tmp_path / name).write_text('[\n {"prompt": "a rose"}\n]\n')
    with pytest.raises(CommandError, match="must be a text, a prompt a line, or JSON Lines"):
        read_prompts(tmp_path / name, None)


def test_a_log_in_another_encoding_and_a_reader_that_goes(tmp_path):
    code = """
import sys
from vstar_kernels.cli.jobs import Outcome
from vstar_kernels.cli.main import main
from vstar_kernels.cli.progress import JobReport
main(["--version"])  # which does what it does for all
with JobReport(2, 0) as report:
    report.ends(Outcome(1, "", "", "done", folder="日本"))
    sys.stdin.readline()
    for number in range(2):
        report.ends(Outcome(2, "", "", "done", folder="b"))
print("said to nobody")
"""
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONIOENCODING": "ascii"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True, cwd=ROOT
    ) as process:
        process.stdout.readline()  # the version
        assert process.stdout.readline() == "[1/2] \\u65e5\\u672c: done\n"  # at once
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
