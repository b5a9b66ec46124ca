"""``make fuzz-inputs``: whatever is read from outside is a valid object or one kind of error.

Valid documents are changed (``documents.py``). What comes of each is either an object that is the
same after it was written and read again, or the error that the reader promises: in one line,
without a key or a control character. Every document that ever failed is an example below.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from contextlib import suppress
from types import SimpleNamespace
from unicodedata import category
from urllib.parse import unquote

import pytest
import torch
from hypothesis import example, given, settings

import vstar_kernels as vk
from tests.fuzz.documents import KEY, documents

pytest.importorskip("openai")
pytest.importorskip("pydantic")
from vstar_kernels.methods.llm.ask import AnswerError, NoText, ask
from vstar_kernels.methods.llm.cache import Cache
from vstar_kernels.methods.llm.endpoint import Endpoint
from vstar_kernels.methods.llm.secrets import redact
from vstar_kernels.methods.starvid.writer import PlanError
from vstar_kernels.methods.vstar.writer import SynopsisError, conversation, stages_form
from vstar_kernels.reading import FormatError, decode, shorten

LONGEST_MESSAGE = 2000
many = settings(max_examples=int(os.environ.get("DOCUMENTS", "1000")))

CONFIGS = [
    vk.TARConfig(1.0),
    vk.TARConfig({0: 1.0, 1: 8.0}, strength={0: 1.0, 1: 0.5}, steps=0.5, stat="map_max"),
    vk.TARConfig(by_width={64: 1.0}, override={32: "identity"}, steps=None, clamp_negative=True),
    vk.TARConfig(bias=vk.ToeplitzBias(torch.tensor([1.0, 0.5, 0.0]))),
    vk.TARConfig(bias={0: vk.DenseBias(torch.eye(3)), 2: vk.DenseBias(torch.ones(2, 2, 2))}),
    vk.TARConfig(bias=vk.ToeplitzBias(torch.ones(2, 5).bfloat16(), signed=True), include_init=True),
]
FRAME_CONFIGS = [
    vk.FrameTAR(),
    vk.FrameTAR(0.5, 2.0, "none", steps=None, layers=range(3, 8, 2), heads=[4, 0]),
    vk.FrameTAR(steps=7),
]
SYNOPSES = [
    {"prompt": "A pond.", "stages": ["Water.", "Ice."]},
    {"prompt": "A pond.", "subprompts": ["Water.", "Thin ice.", "Ice."], "anchors": [0, 4, 9]},
]
LEFT, RIGHT = [0.0, 0.5, 0.25, 1.0], [0.5, 0.0, 1, 0.5]
PLANS = [
    {"prompt": "A pond.", "subjects": [{"noun": "pond", "boxes": [LEFT]}]},
    {
        "prompt": "A duck swims.",
        "subjects": [
            {"noun": "duck", "verb": "swims", "phrase": "slowly", "boxes": [LEFT, None, RIGHT]},
            {"noun": "duck", "verb": None, "boxes": [RIGHT, LEFT, LEFT]},
        ],
        "background": "a pond",
    },
]
GUIDANCES = [
    vk.GuidanceConfig(),
    vk.GuidanceConfig(spatial=None, size=(16, 24), levels=(1, 2), places=("mid",), margin=0.5),
]
PROMPTS = [
    {"prompt": "A pond.", "seed": 3, "frames": 8, "size": "16x24", "name": "pond"},
    {"prompt": "A pond.", "synopsis": ["Water.", "Ice."], "map_steps": [0], "guidance_scale": 2.5},
    {"plan": PLANS[0], "method": "starvid", "guidance": {}, "no_tar": True},
    {"prompt": "A pond.", "config": {"sigma": {"0": 1.0}}, "mode": "slerp", "image": "a.png"},
]
STUDIES = [
    {"prompts": SYNOPSES[:1], "variants": ["baseline", "both"], "seeds": [0, 3], "options": {}},
    {
        "prompts": ["A pond.", {"plan": PLANS[1], "expected": {"duck": 2}}],
        "variants": [{"name": "a", "synopsis": False, "sigma": [1, 2.5], "tar_steps": 0.5}],
        "seeds": 2,
        "scores": {"frame_similarity": {"embedder": "ssim"}, "temporal_distance": {}},
    },
]
STAGES = {"stages": ["Water in a pond.", "Ice on a pond."]}
TEXT = json.dumps(STAGES)


def assert_told(error: BaseException | str) -> None:
    """A message is one short line without a key or a control character."""
    message = str(error)
    assert message
    assert len(message) <= LONGEST_MESSAGE
    assert message.isprintable()
    assert_hidden(message)


def assert_hidden(text: str) -> None:
    """No key can be made out in a text; this shares nothing with what hides it."""
    assert "".join(filter(str.isalnum, KEY)) not in "".join(filter(str.isalnum, unquote(text)))


def assert_clean(*texts: str) -> None:
    for text in texts:
        assert all(category(x) not in ("Cc", "Cs") or x in "\n\t" for x in text)


@many
@given(documents([json.loads(config.to_json()) for config in CONFIGS]))
@example(b'{"bias": {"form": "dense", "delta": [[1]], "dtype": "float4_e2m1fn_x2"}}')
def test_configurations(tmp_path_factory, document):
    path = place(tmp_path_factory, document)
    try:
        config = vk.TARConfig.load(path)
    except FormatError as error:
        assert_told(redact(str(error), [KEY]))
        return
    text = config.to_json()
    assert vk.TARConfig.from_json(text).to_json() == text


@many
@given(documents([json.loads(config.to_json()) for config in FRAME_CONFIGS]))
def test_frame_configurations(tmp_path_factory, document):
    path = place(tmp_path_factory, document)
    try:
        config = vk.FrameTAR.load(path)
    except FormatError as error:
        assert_told(redact(str(error), [KEY]))
        return
    assert vk.FrameTAR.from_json(config.to_json()) == config


@many
@given(documents([*SYNOPSES, SYNOPSES, [SYNOPSES[1]]]))
def test_synopses(document):
    text = document.decode("utf-8", "replace")
    for read in (lambda text: [vk.Synopsis.from_json(text)], vk.Synopsis.list_from_json):
        try:
            synopses = read(text)
        except FormatError as error:
            assert_told(redact(str(error), [KEY]))
            continue
        for synopsis in synopses:
            assert_clean(synopsis.prompt, *synopsis.stages)
            assert vk.Synopsis.from_json(synopsis.to_json()) == synopsis
        assert vk.Synopsis.list_from_json(vk.Synopsis.list_to_json(synopses)) == synopses


@many
@given(documents([*SYNOPSES, SYNOPSES, STAGES, STAGES["stages"]]))
def test_synopsis_files(tmp_path_factory, document):
    path = place(tmp_path_factory, document)
    try:
        synopsis = vk.SynopsisWriter.from_file(path, least_stages=1).write("A pond.")
    except SynopsisError as error:
        assert_told(redact(str(error), [KEY]))
        return
    assert synopsis.prompt == "A pond."
    assert 1 <= len(synopsis.stages) <= 12
    assert_clean(*synopsis.stages)
    assert vk.Synopsis.from_json(synopsis.to_json()) == synopsis


@many
@given(documents([*PLANS, PLANS]))
def test_plans(tmp_path_factory, document):
    path = place(tmp_path_factory, document)
    try:
        found = [vk.Trajectory.load(path)]
    except FormatError as error:
        assert_told(redact(str(error), [KEY]))
        found = []
    with suppress(PlanError):
        found.append(vk.TrajectoryWriter.from_file(path).write("A pond."))
    for plan in found:
        words = [text for x in plan.subjects for text in (x.noun, x.verb, x.phrase) if text]
        assert_clean(plan.prompt, *words)
        assert vk.Trajectory.from_json(plan.to_json()) == plan
        boxes, present = plan.boxes(3)
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (boxes[..., :2] < boxes[..., 2:])[present].all()


@many
@given(documents([json.loads(config.to_json()) for config in GUIDANCES]))
def test_guidance_configurations(tmp_path_factory, document):
    path = place(tmp_path_factory, document)
    try:
        config = vk.GuidanceConfig.load(path)
    except FormatError as error:
        assert_told(redact(str(error), [KEY]))
        return
    assert vk.GuidanceConfig.from_json(config.to_json()) == config
    assert all(math.isfinite(x) for step in range(5) for x in config.weights(step, 5))


def place(tmp_path_factory, document):
    """A file that holds the document, always the same one."""
    path = tmp_path_factory.getbasetemp() / "document.json"
    path.write_bytes(document)
    return path


class Says:
    """A language model that has one answer, and a key."""

    name, key = "it", None

    def __init__(self, text):
        self.text, self.asked = text, []

    def answer(self, messages, schema):
        self.asked.append(messages)
        return self.text

    def redact(self, text):
        return redact(text, [KEY])


FENCED = f"<think>{{1. Water}}</think>\nHere it is:\n```json\n{TEXT}\n```\n"


@many
@given(documents([STAGES, STAGES, FENCED, f"Of {KEY}: {TEXT}"]))
def test_answers_of_language_models(document):
    model = Says(document.decode("utf-8", "replace"))
    try:
        answer = ask(model, conversation("A pond.", 2, 12), stages_form_2_12, attempts=2)
    except AnswerError as error:
        assert_told(error)
        assert len(model.asked) == 2
        assert_hidden(model.asked[1][-2]["content"] + model.asked[1][-1]["content"])
        return
    assert 2 <= len(answer.stages) <= 12
    assert_clean(*answer.stages)
    for stage in answer.stages:
        assert_hidden(stage)


stages_form_2_12 = stages_form(2, 12)
MESSAGE = {"role": "assistant", "content": TEXT}
COMPLETION = {"id": "1", "choices": [{"index": 0, "message": MESSAGE}]}
REFUSAL = {"choices": [{"message": {"content": None, "refusal": f"I will not, {KEY}."}}]}
FAILURES = [{"error": {"message": f"wrong key {KEY}", "code": 3}}, {"error": "no"}]


@many
@given(documents([COMPLETION, REFUSAL, *FAILURES, "<html>busy</html>"]))
def test_responses_of_servers(document):
    endpoint = Endpoint("m", base_url="http://localhost:1/v1", api_key=KEY)
    text = document.decode("utf-8", "replace")
    with suppress(NoText):
        assert isinstance(endpoint._content(text), str)
    try:
        endpoint._content(text)
    except NoText as error:
        assert_told(error)
    response = SimpleNamespace(is_redirect=False, text=text)
    assert_told(endpoint._status_failure(SimpleNamespace(response=response, status_code=400)))


REQUEST = {"model": {"base_url": "http://localhost:1/v1/"}, "messages": [], "schema": {}}


@many
@given(documents([{"request": REQUEST, "answer": STAGES}]))
def test_entries_of_the_cache(tmp_path_factory, document):
    folder = tmp_path_factory.getbasetemp() / "cache"
    cache = Cache(folder)
    folder.mkdir(exist_ok=True)
    cache._path(REQUEST).write_bytes(document)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = cache.get(REQUEST, stages_form_2_12)
    for warning in caught:
        assert_told(redact(str(warning.message), [KEY]))
    assert (answer is None) == bool(caught)
    if answer is not None:
        assert_clean(*answer.stages)
        cache.put(REQUEST, answer)
        assert cache.get(REQUEST, stages_form_2_12) == answer


KEYS = [
    f"{KEY}\n",
    f"\ufeff{KEY}\r\n",
    f'OPENAI_API_KEY="{KEY}"\n',
    f"# mine\n{KEY}\n",
    f" {KEY}\t",
]


@many
@given(documents(KEYS))
def test_keys_as_files_hold_them(document):
    text = document.decode("utf-8", "surrogateescape")
    try:
        endpoint = Endpoint("m", base_url="http://localhost:1/v1", api_key=text)
    except ValueError as error:
        told = str(error)
        assert told == "api_key must be one word of printable ASCII characters"
        return
    kept = endpoint._settings["api_key"]
    assert kept == text.strip() or not text.strip()
    assert all("!" <= character <= "~" for character in kept)
    if len(kept) >= 8:
        assert kept not in endpoint.redact(f"so {kept} it is")
        assert kept not in endpoint.name + json.dumps(endpoint.key)


def result_lines():
    from benchmarks import results

    folder = os.path.dirname(results.__file__)
    found = os.path.join(folder, "results", "cpu-amd-epyc-zen5-2-cores", "float32.jsonl")
    with open(found, encoding="utf-8") as file:
        first, *others = file.read().splitlines()
    plan = json.loads(first)
    plan["plan"]["tasks"] = plan["plan"]["tasks"][:2]
    return plan, [json.loads(line) for line in others[:2]]


RUN, RECORDS = result_lines()


@many
@given(documents([RUN, *RECORDS]))
def test_results_of_benchmarks(tmp_path_factory, document):
    from benchmarks import results

    lines = [json.dumps(RUN).encode(), document, json.dumps(RECORDS[0]).encode()]
    for data in (b"\n".join([*lines, b""]), document + b"\n"):
        path = place(tmp_path_factory, data)
        try:
            run = results.load(path)
        except results.ResultsError as error:
            assert_told(redact(str(error), [KEY]))
            continue
        again = tmp_path_factory.getbasetemp() / "again.jsonl"
        again.unlink(missing_ok=True)
        results.create(again, run.environment, run.plan)
        for record in run.records:
            results.append(again, record)
        assert results.load(again) == run


@pytest.fixture(scope="module")
def video_options(tmp_path_factory):
    """The options of a command whose videos a file asks for."""
    pytest.importorskip("tyro")
    from vstar_kernels.cli.generate.options import (
        GenerateOptions,
        GridOptions,
        OutputOptions,
        RegularizationOptions,
        SynopsisOptions,
        VideoOptions,
    )
    from vstar_kernels.cli.generate.starvid import PlanOptions

    groups = SynopsisOptions(), RegularizationOptions(), GridOptions(), PlanOptions()
    output = OutputOptions(tmp_path_factory.mktemp("output") / "videos")
    return GenerateOptions(VideoOptions("a/model"), *groups, output)


def assert_is_job(job):
    """A job can be known again, and its folder's name is one that a folder may have."""
    from vstar_kernels.cli.jobs import slug

    assert json.loads(json.dumps(job.key)) == job.key
    name = slug(job.name)
    assert name
    assert not set(name) & set("/\\\0\n. ")
    assert len(name.encode()) < 200


@many
@given(documents(PROMPTS))
def test_lines_of_prompts(tmp_path_factory, video_options, document):
    from vstar_kernels.cli.generate.prompts import read_prompts
    from vstar_kernels.cli.options import CommandError

    path = place(tmp_path_factory, document).rename(video_options.output.output.parent / "p.jsonl")
    try:
        jobs = read_prompts(path, video_options)
    except CommandError as error:
        assert_told(shorten(redact(str(error), [KEY]), LONGEST_MESSAGE - 1))
        return
    for job in jobs:
        assert_is_job(job)


@many
@given(documents(STUDIES))
def test_studies(tmp_path_factory, video_options, document):
    from vstar_kernels.cli.options import CommandError
    from vstar_kernels.cli.study.plan import read_study
    from vstar_kernels.cli.study.scores import check_scores

    path = place(tmp_path_factory, document).rename(video_options.output.output.parent / "s.json")
    try:
        plan = read_study(path)
        check_scores(plan.scores)
        videos = plan.videos(video_options)
    except CommandError as error:
        assert_told(shorten(redact(str(error), [KEY]), LONGEST_MESSAGE - 1))
        return
    assert len(videos) == len(plan.prompts) * len(plan.variants) * len(plan.seeds)
    for video in videos:
        assert_is_job(video.job)


@many
@given(documents([{"a": [1, {"b": "text"}], "c": None}]))
def test_any_json(document):
    """Whatever is decoded can be written, and is the same when it is read again."""
    try:
        decoded = decode(document.decode("utf-8", "replace"))
    except FormatError as error:
        assert_told(redact(str(error), [KEY]))
        return
    text = json.dumps(decoded, allow_nan=False, ensure_ascii=False)
    text.encode()
    assert decode(text) == decoded
