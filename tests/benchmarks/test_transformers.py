"""The suite dit-model: whole blocks of video transformers by every peer."""

import pytest
import torch

from benchmarks import frame_adapters, transformers
from benchmarks.cases import Case, Use
from benchmarks.frame_adapters import RefusedError
from benchmarks.peers import PEERS
from benchmarks.report import tables
from benchmarks.results import MEASURED, Outcome, Record, Run
from benchmarks.suites import CPU_CHANNELS, WORKLOADS, Selection, plan
from benchmarks.transformers import Transformer
from tests.benchmarks.conftest import a_plan

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "wan": (
        (0, 3, 6, 0),
        {
            "class": "WanTransformer3DModel",
            "layers": 2,
            "text": 5,
            "settings": {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "ffn_dim": 16,
                "in_channels": 4,
                "text_dim": 8,
                "freq_dim": 8,
            },
        },
    ),
    "cogvideox": (
        (5, 3, 6, 0),
        {
            "class": "CogVideoXTransformer3DModel",
            "layers": 2,
            "text": 5,
            "settings": {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 4,
                "text_embed_dim": 8,
                "time_embed_dim": 8,
                "max_text_seq_length": 5,
                "sample_width": 6,
                "sample_height": 4,
                "use_rotary_positional_embeddings": True,
            },
        },
    ),
}
MODELS = sorted(WORKLOADS["dit-model"]["models"])


def an_operation(name, rule="tar", operation="block"):
    layout, description = TINY[name]
    tokens, head_dim = sum(layout[::3]) + 18, 12 if name == "wan" else 16
    case = Case(
        "dit-model", operation, "float32", 1, tokens, 2, head_dim,
        layout=layout, latents=(4, 6), rule=rule,
    )  # fmt: skip
    return Transformer(case, "cpu", description)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(transformers, "TEXT_CHANNELS", 8)
    monkeypatch.setattr(frame_adapters, "compiled", lambda function: function)
    with torch.no_grad():
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("rule", ["tar", "bias"])
def test_every_peer_is_right_or_says_why_it_cannot(name, rule):
    """Whatever was run before: each puts its own attention in, and leaves the model as it was."""
    found, errors = an_operation(name, rule), {}
    stock = found._predict(*found.inputs[0])
    for _ in range(2):
        for peer_name, peer in PEERS.items():
            if not found.offers(peer) or peer.unavailable("cpu", torch.float32):
                continue
            try:
                timed, _ = found.timed_call(peer_name, peer)
            except RefusedError:
                continue
            timed.prepare()
            result = timed.function(*found.inputs[0])
            errors[peer_name] = found.check(peer, result)
            with pytest.raises(AssertionError, match="relative error"):
                found.check(peer, 1.01 * result)
            with pytest.raises(AssertionError, match="relative error"):
                found.check(peer, result + (stock - found._expected[True]).float() * 2)
    assert {"vstar_kernels", "composed", "sdpa", "strength-0", "sdpa-bias"} <= errors.keys()
    assert ("flex-frames" in errors) == (rule == "bias")
    assert torch.equal(found.timed_call("sdpa", PEERS["sdpa"])[0].function(*found.inputs[0]), stock)


def test_a_block_is_one_and_a_model_is_all():
    sizes = [len(an_operation("wan", operation=x)._model.blocks) for x in ("block", "model")]
    assert sizes == [1, 2]


def test_a_cpu_measures_a_block_at_the_real_width_and_a_gpu_the_model(monkeypatch):
    selection = {"suites": ("dit-model",)}
    found = [task.case for task in plan(Selection(device="cpu", **selection)).tasks]
    assert sorted({use.model for case in found for use in case.uses}) == MODELS
    for case in found:
        (use,) = case.uses
        shape = WORKLOADS["dit"]["models"][use.model]
        assert case.operation == "block"
        assert (case.heads, case.head_dim) == (shape["heads"], shape["head_dim"])
        assert case.layout[1] == shape["frames"]
        assert case.latents[0] * case.latents[1] == 4 * case.layout[2]
        assert case.frames * case.heads * case.head_dim == pytest.approx(CPU_CHANNELS, rel=0.3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = [task.case for task in plan(Selection(device="cuda", **selection)).tasks]
    for case in whole:
        shape = WORKLOADS["dit"]["models"][case.uses[0].model]
        assert case.operation == "model"
        assert case.layout[1:3] == (shape["frames"], shape["tokens"])
        assert case.uses[0].measured == 1


def test_the_real_models_are_those_of_the_shapes():
    """Without their weights: the width that attention has, and the layers."""
    import diffusers

    for model, described in WORKLOADS["dit-model"]["models"].items():
        shape = WORKLOADS["dit"]["models"][model]
        with torch.device("meta"):
            made = getattr(diffusers, described["class"])(**described["settings"], num_layers=1)
        width = shape["heads"] * shape["head_dim"]
        weights = [
            module.weight.shape for name, module in made.named_modules() if name.endswith("to_q")
        ]
        assert set(weights) == {(width, width)}
        assert shape["calls"] == described["layers"]
        assert described["grid"][0] * described["grid"][1] == shape["tokens"]


def test_the_table_has_the_memory_of_each():
    use = Use("wan2.1-1.3b-480p", "21 × 1560", 1, 30, measured=0.004)
    case = Case(
        "dit-model", "block", "float32", 1, 2058, 12, 128,
        layout=(0, 21, 98, 0), latents=(14, 28), rule="tar", uses=(use,),
    )  # fmt: skip
    peers = {
        name: Outcome(MEASURED, [seconds] * 5, peak_bytes=mib * 2**20)
        for name, seconds, mib in (
            ("vstar_kernels", 1.0, 64),
            ("sdpa", 0.9, 60),
            ("sdpa-bias", 2.0, 999),
        )
    }
    run = Run({}, a_plan([case]), [Record(case, "warm", peers)])
    table = tables.transformers(run)
    (row,) = table.rows
    assert list(row) == [
        "wan2.1-1.3b-480p", "TAR, frame_max", "1 × 2058 × 12 × 128: 21 frames of 98", "1/250",
        "float32", "1,000 ", "0.0%", "64", "0.90×", "60", "2.00×", "999",
    ]  # fmt: skip
