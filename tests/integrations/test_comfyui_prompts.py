"""VSTAR Synopsis and Write Synopsis."""

import json
import sys
import types

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.methods.llm.endpoint import KEY_VARIABLE, NO_KEY, URL_VARIABLE


class CLIP:
    """Encodes a text as its words' lengths; long texts have more tokens."""

    def __init__(self, pooled=True, parts=1):
        self.pooled, self.parts = pooled, parts

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        count = 2 if len(text.split()) < 4 else 3
        tokens = torch.full((1, count, 4), float(len(text)))
        more = {"pooled_output": tokens[:, 0] / 2} if self.pooled else {}
        return [[tokens + torch.arange(count)[None, :, None], more]] * self.parts


def test_stages_become_a_row_for_each_frame(run):
    stages = "a\n\n  bbb\nccccc"
    conditioning, text = run("VSTARSynopsis", clip=CLIP(), prompt="p", stages=stages, frames=9)
    ((rows, more),) = conditioning
    assert rows.shape == (9, 2, 4)
    assert rows[:, 0, 0].tolist() == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    torch.testing.assert_close(more["pooled_output"], rows[:, 0] / 2)
    assert vk.Synopsis.from_json(text) == vk.Synopsis("p", ["a", "bbb", "ccccc"])


def test_stages_may_say_their_frames(run):
    stages = "2: a\n6 :bbb: b"
    (((rows, _),), text) = run(
        "VSTARSynopsis", clip=CLIP(), prompt="", stages=stages, frames=8, mode="hold"
    )
    assert rows[:, 0, 0].tolist() == [1.0] * 6 + [6.0] * 2
    assert json.loads(text) == {"prompt": "a", "stages": ["a", "bbb: b"], "anchors": [2, 6]}


def test_a_prompt_alone_is_the_only_stage(run):
    (((rows, more),), _) = run("VSTARSynopsis", clip=CLIP(False), prompt=" rose ", frames=3)
    assert rows.shape == (3, 2, 4)
    assert (rows[:, 0] == 4).all()
    assert "pooled_output" not in more


def test_texts_of_different_lengths_are_attended_to_as_they_were(run):
    stages = "a b\na b c d e f"
    (((rows, _),), _) = run("VSTARSynopsis", clip=CLIP(), prompt="p", stages=stages, frames=2)
    assert rows.shape == (2, 6, 4)
    query = torch.randn(1, 5, 4)
    for row, stage in zip(rows, stages.splitlines(), strict=True):
        alone = CLIP().encode_from_tokens_scheduled(stage)[0][0]
        attend = torch.nn.functional.scaled_dot_product_attention
        torch.testing.assert_close(attend(query, row[None], row[None]), attend(query, alone, alone))


def test_texts_that_would_be_too_long_together(run):
    class Long(CLIP):
        def encode_from_tokens_scheduled(self, text):
            return [[torch.zeros(1, 77 * int(text), 4), {}]]

    def encode(*lengths):
        stages = "\n".join(map(str, lengths))
        (((rows, _),), _) = run("VSTARSynopsis", clip=Long(), prompt="p", stages=stages, frames=16)
        return rows.shape[1]

    assert encode(*range(1, 7)) == 77 * 60
    with pytest.raises(ValueError, match=r"have 385, 539, 693 tokens: .* 24255, more than 4620"):
        encode(5, 7, 9)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"stages": "0: a\nb"}, "either every stage says its frame.*'b' does not"),
        ({"stages": "0: a\n16: b"}, "anchors must be below num_frames, 16"),
        ({"stages": "4: a\n4: b"}, "anchors must increase strictly"),
        ({"prompt": ""}, "prompt"),
        ({"clip": CLIP(parts=2)}, "encodes a text in 2 parts"),
    ],
)
def test_what_is_no_synopsis_is_an_error(run, inputs, message):
    with pytest.raises(ValueError, match=message):
        run("VSTARSynopsis", **{"clip": CLIP(), "prompt": "p", **inputs})


@pytest.fixture
def asked(monkeypatch):
    """What SynopsisWriter is asked for."""
    asked = types.SimpleNamespace(form="stage\n {}")

    class Writer:
        def write(self, prompt, *, num_stages):
            asked.prompt = prompt
            return vk.Synopsis(prompt, [asked.form.format(i) for i in range(num_stages)])

    def from_endpoint(model, **settings):
        asked.model, asked.settings = model, settings
        return Writer()

    monkeypatch.setattr(vk.SynopsisWriter, "from_endpoint", from_endpoint)
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    return asked


def test_a_language_model_writes_stages(run, asked, monkeypatch):
    (text,) = run("VSTARWriteSynopsis", prompt=" A rose. ", stages=3, model="llama3")
    assert text == "stage 0\nstage 1\nstage 2"
    assert (asked.prompt, asked.model) == ("A rose.", "llama3")


def test_stages_that_a_model_numbers_say_no_frame(nodes, run, asked):
    asked.form = "{}: a bud"
    (text,) = run("VSTARWriteSynopsis", prompt="A rose.", stages=2)
    assert text == "Stage 0: a bud\nStage 1: a bud"
    read = sys.modules[f"{nodes.__name__}.prompts"].read_stages
    assert read("A rose.", text).anchors is None
    asked.form = "a bud, {}: red"  # which says no frame either, as it does not begin so
    (text,) = run("VSTARWriteSynopsis", prompt="A rose.", stages=2)
    assert text == "a bud, 0: red\na bud, 1: red"
    assert read("A rose.", text).anchors is None


@pytest.mark.parametrize(
    ("server", "own", "key"),
    [
        ("http://localhost:11434/v1", None, NO_KEY),
        ("https://elsewhere.example/v1", None, NO_KEY),
        ("https://elsewhere.example/v1", "https://mine.example/v1", NO_KEY),
        ("https://mine.example/v1/", "https://mine.example/v1", None),
        ("https://api.openai.com/v1", None, None),
        ("", "https://mine.example/v1", None),
        ("", None, None),
    ],
)
def test_the_key_goes_to_no_server_that_only_a_graph_names(
    run, asked, monkeypatch, server, own, key
):
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    if own is not None:
        monkeypatch.setenv(URL_VARIABLE, own)
    run("VSTARWriteSynopsis", prompt="A rose.", server=server)
    assert asked.settings == {"base_url": server or None, "api_key": key}


def test_it_is_asked_again_where_the_environment_has_changed(nodes, monkeypatch):
    node = next(x for x in nodes.NODES if x.define_schema().node_id == "VSTARWriteSynopsis")
    before = node.fingerprint_inputs(prompt="A rose.")
    assert node.fingerprint_inputs(prompt="A rose.") == before
    monkeypatch.setenv(URL_VARIABLE, "https://mine.example/v1")
    assert node.fingerprint_inputs(prompt="A rose.") != before
