import dataclasses

import pytest
import torch

from benchmarks import frame_adapters
from benchmarks.cases import Case
from benchmarks.frame_adapters import RefusedError
from benchmarks.frames import RULES, Frames, layout_of, visible_share
from benchmarks.peers import PEERS
from benchmarks.suites import CPU_TOKENS, WORKLOADS, Selection, plan

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUT = (5, 4, 9, 3)
NOT_HERE = ("ultravico", "sage", "flash-attn")


def an_operation(rule, dtype="float32"):
    torch.manual_seed(0)
    return Frames(Case("frames", "frames", dtype, 1, 44, 2, 16, layout=LAYOUT, rule=rule), "cpu", 1)


def cases(**options):
    return [task.case for task in plan(Selection(suites=("frames",), **options)).tasks]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.build_frames])
def test_every_peer_is_right_or_says_why_it_cannot(name, rule, dtype, monkeypatch):
    monkeypatch.setattr(frame_adapters, "compiled", lambda function: function)
    found, peer = an_operation(rule, dtype), PEERS[name]
    if why := peer.unavailable("cpu", found.case.torch_dtype):
        assert name in NOT_HERE, why
        return
    try:
        timed, _ = found.timed_call(name, peer)
        result = timed.function(*found.inputs[0])
    except RefusedError:
        return  # the next test says who and why
    except NotImplementedError:
        assert (name, rule) == ("flex-frames", "tar-row-max")  # no row maxima on a CPU
        return
    found.check(peer, result)
    assert isinstance(result, tuple) == (rule == "map" and peer.ours and peer.tar)
    for tensor in result if isinstance(result, tuple) else (result,):
        tensor[:, 0] *= 1.5
        with pytest.raises(AssertionError, match=r"error|row of the map"):
            found.check(peer, result)
        tensor[:, 0] /= 1.5


def test_who_obeys_which_rule():
    refused = {}
    for rule in RULES:
        for name in ("composed", "sdpa-bias", "flex-frames"):
            try:
                an_operation(rule).timed_call(name, PEERS[name])
            except RefusedError as refusal:
                refused[name, rule] = str(refusal)
    assert set(refused) == {
        ("composed", "tar-row-max"),
        ("composed", "attenuate"),
        ("sdpa-bias", "attenuate"),
        ("sdpa-bias", "map"),
        ("flex-frames", "tar"),
        ("flex-frames", "map"),
    }
    assert "log-sum-exp of each frame" in refused["flex-frames", "tar"]


def test_a_peer_without_the_rule_is_held_to_plain_attention():
    found = an_operation("tar")
    for name in ("sdpa", "strength-0"):
        timed, _ = found.timed_call(name, PEERS[name])
        result = timed.function(*found.inputs[0])
        found.check(PEERS[name], result)
        with pytest.raises(AssertionError, match="error"):
            found.check(PEERS["vstar_kernels"], result)


def test_results_in_integers_are_held_to_their_own_bound():
    found = an_operation("none")
    peer = dataclasses.replace(PEERS["sdpa"], quantised=True)
    result = found.timed_call("sdpa", PEERS["sdpa"])[0].function(*found.inputs[0])
    found.check(peer, 1.05 * result)
    with pytest.raises(AssertionError, match="relative error"):
        found.check(peer, 1.2 * result)


def test_the_floor_is_that_of_the_visible_pairs():
    layout = layout_of(*LAYOUT)
    assert visible_share(layout, None) == 1
    window = RULES["window"].make(4)  # a frame sees itself and text
    pairs = 8 * 44 + 36 * (9 + 8)
    assert visible_share(layout, window) == pytest.approx(pairs / 44**2)
    case = Case("frames", "frames", "float32", 1, 44, 2, 16, layout=LAYOUT, visible=0.25)
    assert case.flops == 4 * 44 * 44 * 2 * 16 * 0.25
    assert case.bytes == 4 * 4 * 44 * 2 * 16


def test_a_cpu_measures_smaller_shapes_and_says_so():
    found = cases(device="cpu", threads=1)
    uses = [(case, use) for case in found for use in case.uses]
    assert {use.model for _, use in uses} == set(WORKLOADS["dit"]["models"])
    assert len({case.key for case in found}) == len(found)
    for case, use in uses:
        shape = WORKLOADS["dit"]["models"][use.model]
        assert case.layout[1] == shape["frames"]
        assert case.head_dim == shape["head_dim"]
        assert abs(case.frames - CPU_TOKENS) < 64
        full = shape["text_first"] + shape["text_last"] + shape["frames"] * shape["tokens"]
        ratio = (case.frames / full) ** 2 * case.heads / shape["heads"]
        assert use.measured == pytest.approx(ratio)
    hunyuan = next(case for case in found if case.uses[0].model == "hunyuanvideo-720p")
    assert hunyuan.size == "1 × 4101 × 2 × 128: 33 frames of 124 + 9 of text, none"
    full = cases(device="cpu", full_rows=True, transformers=("hunyuanvideo-720p",), rules=("tar",))
    assert [case.shape for case in full] == [(1, 119_056, 24, 128)]
    assert full[0].uses[0].measured == 1


def test_quick_runs_measure_one_model_under_every_rule():
    assert [case.rule for case in cases(device="cpu", quick=True)] == list(RULES)
