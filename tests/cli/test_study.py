"""``vstar-kernels study`` from its file to its tables and its page, on a tiny pipeline."""

import csv
import json

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.cli.main import main

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
pytest.importorskip("yaml")
import numpy as np

from tests.browser import HOSTILE
from tests.methods.starvid.pipelines import PLAN
from vstar_kernels.cli.generate import batch
from vstar_kernels.cli.generate.options import (
    GenerateOptions,
    GridOptions,
    OutputOptions,
    RegularizationOptions,
    SynopsisOptions,
    VideoOptions,
)
from vstar_kernels.cli.generate.starvid import PlanOptions
from vstar_kernels.cli.options import CommandError
from vstar_kernels.cli.study import scores as scores_module
from vstar_kernels.cli.study.figures import labels_of, plot_sweep, swept_names
from vstar_kernels.cli.study.plan import Prompt, Variant, Video, read_study
from vstar_kernels.cli.study.report import write_report
from vstar_kernels.cli.study.scores import Scored, named, score_video
from vstar_kernels.cli.study.table import Row

pytestmark = [
    pytest.mark.usefixtures("one_thread", "wide_terminal"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
SMALL = ("--frames", 3, "--steps", 2, "--size", "16x16", "--no-maps")
OFFICIAL = [
    {"prompt": "a rose", "subprompts": ["a bud", "a rose"]},
    {"prompt": "a kite", "subprompts": ["a kite low", "a kite high"]},
]
COUNTED, JUDGED = [], []


def detector(frames, nouns):
    COUNTED.append(list(nouns))
    return torch.ones(len(frames), len(nouns))


def judge(picture):
    JUDGED.append(picture.shape)
    return 4.0


def retriever(frames, sentences):
    return torch.arange(1.0, len(sentences) + 1)


def broken(picture):
    raise RuntimeError("no model here")


@pytest.fixture
def study(model, tmp_path, capsys):
    """Run the command on what a file says; its exit status and what it printed."""

    def run(content, *arguments, name="study.json"):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
        given = [tmp_path / name, "--model", model, *SMALL, "--output", tmp_path / "out"]
        status = main(["study", *map(str, given), *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_columns_of_the_paper(study, tmp_path, monkeypatch):
    status, printed = study(OFFICIAL, "--seeds", 3, "--scores", "frame_similarity")
    assert status == 0, printed
    out = tmp_path / "out"
    rows = table(out / "scores.csv")
    variants = ["baseline", "VSP", "TAR", "both"]
    expected = [(prompt, v, "3") for prompt in ("a rose", "a kite") for v in variants]
    assert [(row["prompt"], row["variant"], row["seed"]) for row in rows] == expected
    # Each is what its name says.
    records = [json.loads((out / row["folder"] / "generation.json").read_text()) for row in rows]
    assert [record["config"] is None for record in records[:4]] == [True, True, False, False]
    stages = [len(record["synopsis"]["stages"]) for record in records[:4]]
    assert stages == [1, 2, 1, 2]
    assert [record["seed"] for record in records] == [3] * 8
    # The scores are those of the frames, before a codec saw them.
    column = "frame similarity (pixels)"
    for row in rows:
        with np.load(out / row["folder"] / "frames.npz") as arrays:
            similarity = vk.analysis.frame_similarity(arrays["frames"])
        assert float(row[column]) == pytest.approx(float((similarity.sum() - 3) / 6), rel=1e-5)
    means = table(out / "variants.csv")
    assert [row["variant"] for row in means] == variants
    of_baseline = [float(row[column]) for row in rows if row["variant"] == "baseline"]
    assert float(means[0][column]) == pytest.approx(np.mean(of_baseline))
    assert float(means[0][f"{column}, deviation"]) == pytest.approx(np.std(of_baseline, ddof=1))
    page = (out / "study.html").read_text(encoding="utf-8")
    assert page.count("<video src=") == 8
    # Over variants, over the interval, the first prompt's matrices, and histograms.
    assert page.count("data:image/svg+xml") == 4
    for name in ("over-variants", "over-interval", "similarities", "histograms"):
        assert (out / f"{name}.png").stat().st_size > 1000

    # Run again it makes and scores nothing, and neither with fewer of them.
    monkeypatch.setattr(batch, "load_pipeline", None)
    monkeypatch.setattr(scores_module, "frame_similarity", None)
    options = ["--seeds", 3, "--scores", "frame_similarity", "--variants", "both", "TAR"]
    status, printed = study(OFFICIAL, *options)
    assert status == 0, printed
    assert "0 made, 4 there already, 0 failed" in printed
    assert [row["variant"] for row in table(out / "variants.csv")] == ["both", "TAR"]


YAML = """
prompts:
  - prompt: a cat
  - "a dog {hostile}"
variants:
  - {name: plain, no_tar: true, synopsis: false}
  - {sigma: [0.5, 2], strength: [1, 8.5], synopsis: false}
  - {name: wrong, preset: 999D1, synopsis: false}
options: {frames: 2}
scores: {temporal_distance: {}, action_binding: {judge: "tests.cli.test_study:broken"}}
"""


def test_a_sweep_with_failures(study, tmp_path):
    content = YAML.replace("{hostile}", HOSTILE.replace('"', r"\""))
    status, printed = study(content, "--frames", 3, name="a.yaml")
    assert status == 1
    assert "10 made, 0 there already, 2 failed" in printed
    assert "wrong seed 0 a cat: no temporal attention has width 999" in printed
    assert "not scored: plain seed 0 a cat: action_binding: no model here" in printed
    rows = table(tmp_path / "out/scores.csv")
    assert len(rows) == 10
    assert (
        rows[0]["distance of neighbours (pixels)"] == rows[0]["distance of first and last (pixels)"]
    )
    names = ["σ = 0.5, strength = 1", "σ = 0.5, strength = 8.5", "σ = 2, strength = 1"]
    assert [row["variant"] for row in rows[1:4]] == names
    config = vk.TARConfig.load(tmp_path / "out" / rows[2]["folder"] / "config.json")
    assert (config.sigma, config.strength, config.steps) == (0.5, 8.5, 0.56)
    page = (tmp_path / "out/study.html").read_text(encoding="utf-8")
    for part in ("Scores over σ", "Scores over strength", "wrong: <span", "action_binding: no mod"):
        assert part in page
    assert HOSTILE not in page
    assert "<script" not in page
    assert (tmp_path / "out/over-sigma.png").exists()


def test_a_full_3d_transformer(model, study, tmp_path):
    """The variants of a sweep are FrameTAR's there, beside rules between frames."""
    from examples import tiny_transformers

    tiny_transformers.wan().save_pretrained(tmp_path / "wan")
    vk.FrameRule.window(1).save(tmp_path / "window.json")
    vk.FrameTAR(heads=[0]).save(tmp_path / "one-head.json")
    variants = [
        {"strength": [0.5, 2]},
        {"name": "window", "config": "window.json"},
        {"name": "far keys", "config": json.loads(vk.FrameRule.attenuate(0.9, window=1).to_json())},
        {"name": "one head", "config": "one-head.json", "sigma": 2},
    ]
    content = {"prompts": ["a"], "variants": [{**x, "synopsis": False} for x in variants]}
    given = ("--model", tmp_path / "wan", "--frames", 5, "--size", "32x32")
    status, printed = study(content, *given)
    assert status == 0, printed
    configs = {x["variant"]: x["folder"] for x in table(tmp_path / "out/scores.csv")}
    found = {name: (tmp_path / "out" / x / "config.json") for name, x in configs.items()}
    assert vk.FrameTAR.load(found["strength = 2"]) == vk.FrameTAR(strength=2.0)
    assert vk.FrameTAR.load(found["one head"]) == vk.FrameTAR(2.0, heads=[0])
    assert vk.FrameRule.load(found["window"]).to_json() == vk.FrameRule.window(1).to_json()
    assert "attenuate" in found["far keys"].read_text()


def test_a_variants_tar_takes_the_place_of_the_options(tmp_path):
    content = {"options": {"sigma": 2}, "variants": ["baseline", "64D1", {"strength": 3}]}
    tasks = planned(tmp_path, content, writer="m")
    assert [x.regularization.sigma for x in tasks] == [None, None, 2]


def test_scores_of_subjects(study, tmp_path):
    """StarVid's, over a file of prompts with plans, and others by callables."""
    COUNTED.clear()
    here = "tests.cli.test_study"
    sentences = {"general": ["a video"], "metamorphic": ["a time lapse"], "top": None}
    content = {
        "prompts": [
            {"plan": json.loads(PLAN.to_json()), "expected": {"cat": 1, "dog": 2}},
            {"plan": json.loads(PLAN.to_json()) | {"prompt": "dog naps cat eats"}},
        ],
        "variants": [{"name": "StarVid", "method": "starvid", "no_tar": True}],
        "options": {"steps": 1},
        "scores": {
            "numeracy": {"detector": f"{here}:detector", "num_frames": 2},
            "action_binding": {"judge": f"{here}:judge"},
            "mt_score": {"retriever": f"{here}:retriever", **sentences},
        },
    }
    writer = ["--method", "starvid", "--writer", "nobody", "--key-frames", 3]
    status, printed = study(content, *writer)  # for whom nothing is left to plan
    assert status == 0, printed
    rows = table(tmp_path / "out/scores.csv")
    assert [float(row["numeracy"]) for row in rows] == [0.5, 1.0]
    assert [float(row["action binding"]) for row in rows] == [0.8, 0.8]
    assert float(rows[0]["MTScore"]) == pytest.approx(float(torch.tensor(1.0).sigmoid()))
    assert [["cat", "dog"], [subject.noun for subject in PLAN.subjects]] == COUNTED
    assert study(content)[0] == 0
    assert len(COUNTED) == 2
    assert study(content, "--rescore")[0] == 0
    assert len(COUNTED) == 4
    content["prompts"][0]["expected"] = {"cat": 1}  # of the same video, which is not made again
    status, printed = study(content)
    assert (status, "0 made, 2 there already" in printed) == (0, True), printed
    assert [float(row["numeracy"]) for row in table(tmp_path / "out/scores.csv")] == [1.0, 1.0]


def test_clip(study, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda name: 1 / 0)
    status, printed = study(["a"], "--variants", "TAR", "--scores", "clip_vl")
    assert status == 1
    assert "1 made, 0 there already, 0 failed" in printed
    assert "not scored: clip_vl: scores: clip_vl: division by zero" in printed


def test_files_of_prompts(tmp_path):
    def texts(name, content):
        (tmp_path / name).write_text(content)
        return [prompt.text for prompt in read_study(tmp_path / name).prompts]

    table = 'videoid,name,sub_category\na_1,"Time-lapse of a, b",a\na_2,Another,a\n'
    assert texts("chrono.csv", table) == ["Time-lapse of a, b", "Another"]
    assert texts("lines.jsonl", '{"prompt": "a rose"}\n"a kite"\n') == ["a rose", "a kite"]
    (tmp_path / "wrong.jsonl").write_text('"a"\n{"prompt": 3\n')
    (tmp_path / "of.json").write_text('{"prompts": "wrong.jsonl"}')
    with pytest.raises(
        CommandError, match=r"of.json: prompts: wrong.jsonl: line 2: it is not JSON"
    ):
        read_study(tmp_path / "of.json")
    assert texts("prompts.txt", "one\n\n two \n") == ["one", "two"]
    assert texts("other.json", '{"prompts": "chrono.csv", "seeds": 2}')[1] == "Another"
    assert texts("mac.csv", "name,b\rA,1\rB,2\r") == ["A", "B"]
    assert texts("lines.txt", "a\u2028b\r\nc\r") == ["a\u2028b", "c"]
    plan = read_study(tmp_path / "other.json")
    assert (plan.seeds, [x.name for x in plan.variants]) == ([0, 1], ["baseline", "TAR"])


def planned(tmp_path, content, **options):
    """The videos of a study for a command with some options."""
    (tmp_path / "study.json").write_text(json.dumps({"prompts": ["a"], **content}))
    base = GenerateOptions(
        VideoOptions(model="a/b"),
        SynopsisOptions(**options),
        RegularizationOptions(),
        GridOptions(),
        PlanOptions(),
        OutputOptions(output=tmp_path / "out"),
    )
    return [video.job.task for video in read_study(tmp_path / "study.json").videos(base)]


def test_a_variant_goes_before_the_options_of_all(tmp_path):
    content = {"options": {"preset": "64D1", "writer": "m"}, "variants": ["baseline", "both"]}
    baseline, both = planned(tmp_path, content)
    chosen = [(x.regularization.preset, x.regularization.no_tar) for x in (baseline, both)]
    assert chosen == [(None, True), ("64D1", False)]
    assert [x.synopsis.writer for x in (baseline, both)] == [None, "m"]
    # The study's own writer stands for the stages that prompts have not, and null is none.
    with pytest.raises(CommandError, match="'both' has stages, and 'a' has none"):
        planned(tmp_path, {"options": {"writer": None}, "variants": ["both"]}, writer="m")


def test_a_writer_that_a_variant_does_not_ask_is_not_refreshed(tmp_path):
    content = {"variants": ["baseline", "both"]}
    baseline, both = planned(tmp_path, content, writer="m", stages=3, refresh=True)
    assert [x.synopsis.refresh for x in (baseline, both)] == [False, True]


def test_a_line_of_a_plot_is_of_one_variant(tmp_path):
    sigma = {"sigma": [0.5, 1], "synopsis": False}
    variants = [
        {"name": "weak", "strength": 0.5, **sigma},
        {"name": "strong", "strength": 2, **sigma},
        {"guidance_scale": 3, "strength": [3, 4], **sigma},
    ]
    (tmp_path / "study.json").write_text(json.dumps({"prompts": ["a"], "variants": variants}))
    rows = [
        Row(i, "", "a", variant, 0, {"score": float(i)}, {}, {})
        for i, variant in enumerate(read_study(tmp_path / "study.json").variants)
    ]
    (axes,) = plot_sweep(rows, ["score"], "sigma", "σ").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {
        "weak": [0, 1],
        "strong": [2, 3],
        "guidance_scale = 3, without stages, strength = 3": [4, 5],
        "guidance_scale = 3, without stages, strength = 4": [6, 7],
    }


def test_values_that_are_no_numbers_have_no_place_on_an_axis(tmp_path):
    variants = [
        {"sigma": [{"0": 1, "1": 8}, None], "synopsis": False},
        {"name": "weak", "strength": 0.5, "sigma": [1, 2], "no_maps": [True, False]},
    ]
    (tmp_path / "study.json").write_text(json.dumps({"prompts": ["a"], "variants": variants}))
    variants = read_study(tmp_path / "study.json").variants
    assert [x.name for x in variants[:2]] == ["σ = {'0': 1, '1': 8}", "σ = default"]
    rows = [Row(i, "", "a", x, 0, {"score": float(i)}, {}, {}) for i, x in enumerate(variants)]
    assert swept_names(rows) == ["sigma"]
    assert swept_names(rows[:2]) == []
    (axes,) = plot_sweep(rows, ["score"], "sigma", "σ").axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [1, 2]]


def test_a_step_and_a_share_have_different_names(tmp_path):
    text = "prompts: [a]\nvariants: [{tar_steps: [1, 1.0], sigma: 1e1, synopsis: false}]"
    (tmp_path / "study.yaml").write_text(text)
    variants = read_study(tmp_path / "study.yaml").variants
    assert [x.name for x in variants] == ["steps of TAR = 1", "steps of TAR = 1.0"]
    assert [x.changes["sigma"] for x in variants] == [10, 10]
    rows = [Row(i, "", "a", x, 0, {"score": float(i)}, {}, {}) for i, x in enumerate(variants)]
    (axes,) = plot_sweep(rows, ["score"], "tar_steps", "steps of TAR").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert list(lines.values()) == [[0], [1]]
    assert [label.rpartition(" ")[2] for label in lines] == ["(indices)", "(shares)"]


def test_only_figures_that_a_study_wrote_go(tmp_path):
    def report(swept):
        variants = [Variant(f"{x}", {}, swept={swept: x}) for x in (1, 2)]
        rows = [Row(i, "", "a", x, 0, {"score": 1.0}, {}, {}) for i, x in enumerate(variants)]
        write_report(tmp_path, "t", [], rows, [], [])
        return {path.name for path in tmp_path.glob("*.png")}

    mine = {"over-mine.png", "similarities.png"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    assert report("sigma") == {"over-variants.png", "over-sigma.png", *mine}
    assert report("strength") == {"over-variants.png", "over-strength.png", *mine}
    (tmp_path / "outside.png").write_text("mine")
    for record in ('["../outside.png", "/outside.png", ".", 3]', "[", "{}"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/figures.json").write_text(record)
        write_report(tmp_path / "out", "t", [], [], [], [])
    assert {(tmp_path / name).read_text() for name in (*mine, "outside.png")} == {"mine"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "prompts must hold at least one"),
        (["a", "a"], "prompts must have each once, got 'a' twice"),
        ([3], "prompts[0]: it must be a text or an object, got int"),
        ([{"prompt": "a", "stages": []}], "prompts[0]: not a synopsis: stages must hold at least"),
        ([{"prompt": "a", "expected": {"cat": "1"}}], "prompts[0]: expected must map nouns"),
        ({}, "prompts: it is missing"),
        ({"prompts": ["a"], "seed": 1}, "seed: there is no such field"),
        ({"prompts": ["a"], "seeds": [-1]}, "seeds: it must be a number from 1 to 100000, or a "),
        ({"prompts": ["a"], "seeds": 0}, "seeds: it must be a number from 1 to 100000, or a list"),
        ({"prompts": 5}, "prompts: it must be a list, or the name of a file, got 5"),
        ({"prompts": ["a"], "variants": [5]}, "variants[0]: it must be a name or an object, got 5"),
        ({"prompts": ["a"], "scores": 5}, "scores: it must be a list of names, or an object with"),
        ([{"prompt": "a", "expected": {"cat": -1}}], "prompts[0]: expected must map nouns"),
        (
            {"prompts": ["a"], "variants": [{"preset": 5, "sigma": 1, "synopsis": False}]},
            "variant 'preset = 5, σ = 1': preset must be a text, got 5",
        ),
        (
            {"prompts": ["a"], "variants": [{"preset": "64", "synopsis": False}]},
            "variant 'preset = 64': --preset: a preset must be <width>D<sigma>",
        ),
        (
            {"prompts": ["a"], "variants": [{"config": 5, "sigma": 1, "synopsis": False}]},
            "config is wrong: ",
        ),
        ({"prompts": ["a"], "seeds": [0, 0]}, "seeds must have each once, got 0 twice"),
        ({"prompts": "study.json"}, "prompts: study.json must hold a list, got dict"),
        (
            {"prompts": ["a"], "variants": [{"sigma": [], "synopsis": False}]},
            "variants[0]: sigma must have at least one value, got []",
        ),
        ({"prompts": ["a"], "variants": ["64"]}, "variants[0]: "),
        ({"prompts": ["a"], "variants": ["TAR", "TAR"]}, "variants must have different names"),
        ({"prompts": ["a"], "variants": ["both"]}, "variant 'both' has stages, and 'a' has none"),
        ({"prompts": ["a"], "variants": [{"sigma": -1, "synopsis": False}]}, "sigma must be"),
        (
            {"prompts": ["a"], "variants": [{"sigma": 1, "no_tar": True, "synopsis": False}]},
            "--sigma cannot go with --no-tar",
        ),
        ({"prompts": ["a"], "variants": [{"sead": 1, "synopsis": False}]}, "no option 'sead'"),
        ({"prompts": ["a"], "options": {"seed": 3}}, "options: seed cannot be here: the study has"),
        ({"prompts": ["a"], "variants": [{"prompt": "b"}]}, "a variant: prompt cannot be here"),
        ({"prompts": ["a"], "options": {"frames": 0}}, "variant 'baseline': frames must be an int"),
        ({"prompts": ["a"], "scores": ["beauty"]}, "there is no score 'beauty'; there are frame_s"),
        ({"prompts": ["a"], "scores": ["numeracy"]}, "scores: numeracy: missing a required arg"),
        (
            {"prompts": ["a"], "scores": {"action_binding": {"judge": "nowhere:f"}}},
            "scores: action_binding: judge 'nowhere:f' cannot be imported",
        ),
    ],
)
def test_wrong_files(study, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(batch, "load_pipeline", None)
    status, printed = study(content)
    assert status == 2, printed
    assert "vstar-kernels study: error: " in printed
    assert message in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("variant", "name"), [({}, "both"), ({"synopsis": False}, "TAR")])
def test_what_a_variant_without_a_name_is_called(tmp_path, variant, name):
    (tmp_path / "a.json").write_text(json.dumps({"prompts": ["a"], "variants": [variant]}))
    assert [x.name for x in read_study(tmp_path / "a.json").variants] == [name]


def test_wrong_commands(study):
    for option, value in {"--prompt": "p", "--seed": 3, "--plan": "f"}.items():
        status, printed = study(["a"], option, value, *["--method", "starvid"] * (value == "f"))
        assert (status, f"{option} is for one video: a study's are in" in printed) == (2, True)
    status, printed = study("prompts: [2020-01-01]", name="a.yaml")
    assert (status, "it is not YAML of texts" in printed) == (2, True)
    status, printed = study("[" * 3000, name="a.yaml")
    assert (status, "it is nested too deeply" in printed) == (2, True)
    status, printed = study('prompt\n"' + "x" * 200_000, name="a.csv")
    assert (status, "it is not a table (CSV): field larger than" in printed) == (2, True)
    status, printed = study("a,b\n1,2\n", name="a.csv")
    assert (status, "a table must have a column prompt, name, caption, got a, b" in printed) == (
        2,
        True,
    )


@pytest.mark.parametrize("where", [3, "numpy", "numpy:", ":pi", "numpy:pi", "numpy:nothing"])
def test_what_is_no_callable(where):
    with pytest.raises(ValueError, match=r"must be module:name|cannot be imported"):
        named(where)


def test_scores_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(scores_module, "_frames", lambda folder: None)
    video = Video(Prompt("a"), Variant("both", {}), 0, None)

    def score(name, value, **options):
        scorer = (name, lambda frames, prompt: Scored({name: value}, {"c": [1.0]}))
        return score_video(tmp_path, video, {name: scorer}, **{"again": False, **options})[name]

    score("one", 1.0)
    score("two", 2.0)
    assert score("two", 3.0).values == {"two": 2.0}
    # To compute one again leaves the others.
    assert score("two", 4.0, again=True).values == {"two": 4.0}
    assert score("one", 5.0) == Scored({"one": 1.0}, {"c": [1.0]})
    with pytest.raises(ValueError, match="three must be a finite number, is nan"):
        score("three", float("nan"))
    text = (tmp_path / "scores.json").read_text()
    (tmp_path / "scores.json").write_text(text.replace("1.0", '"much"'))
    assert score("one", 6.0).values == {"one": 6.0}


def test_labels_are_short_and_different():
    names = ["both", "x" * 999 + "1", "x" * 999 + "2", "two\nlines", "both"]
    labels = labels_of(names)
    assert list(labels) == names[:4]
    assert [*labels.values()][::3] == ["both", "two lines"]
    assert len(set(labels.values())) == 4
    assert max(map(len, labels.values())) < 70
