import time

import pytest
import torch

from benchmarks.clock import FEWEST_ROUNDS, CpuClock, GpuClock, TimedCall, time_in_turn


def times_of(calls, *, rounds, seconds=60.0, sets=1):
    clock, inputs = CpuClock(), [(index,) for index in range(sets)]
    warm = [clock.warm_up(x, inputs) for x in calls]
    return time_in_turn(clock, warm, sets, rounds=rounds, seconds=seconds)


def test_every_round_has_everyone_in_another_order():
    seen = []
    calls = [TimedCall(name, lambda _, name=name: seen.append(name)) for name in "abcd"]
    times = times_of(calls, rounds=20)
    assert {name: len(x) for name, x in times.items()} == dict.fromkeys("abcd", 20)
    rounds = ["".join(seen[i : i + 4]) for i in range(8, len(seen), 4)]  # after the warm-up
    assert {"".join(sorted(x)) for x in rounds} == {"abcd"}
    assert len(set(rounds)) > 5


def test_inputs_rotate_and_preparation_is_not_timed():
    prepared, seen = [], []

    def prepare():
        prepared.append(time.sleep(0.01))

    times = times_of([TimedCall("a", seen.append, prepare)], rounds=7, sets=3)
    assert seen[-7:] == [0, 1, 2, 0, 1, 2, 0]
    assert len(prepared) == 1 + 1 + 7  # warm, the round that is not timed, the rounds
    assert min(times["a"]) < 0.005


def test_rounds_end_when_the_time_does():
    slow = TimedCall("a", lambda _: time.sleep(0.002))
    assert len(times_of([slow], rounds=100, seconds=0.0)["a"]) == FEWEST_ROUNDS
    assert len(times_of([slow], rounds=3, seconds=0.0)["a"]) == 3


def test_short_calls_are_timed_many_at_once():
    calls = []

    def call(index):
        calls.append(time.sleep(1e-3))

    times = times_of([TimedCall("a", call, repeats=30)], rounds=2)
    assert len(calls) == 1 + 1 + 2 * 30
    assert all(1e-3 <= seconds < 15e-3 for seconds in times["a"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_graphs_replay_what_was_captured_and_others_are_launched():
    """The synchronising call is not captured, which would leave this process of no use."""
    clock = GpuClock()
    inputs = [(torch.full((2**22,), float(n), device="cuda"),) for n in range(3)]
    out = torch.empty_like(inputs[0][0])

    def synchronising(x):
        out.copy_(x)
        return out.sum().item()  # not allowed in a capture

    for timed in (TimedCall("a", out.copy_), TimedCall("b", synchronising, capture=False)):
        warm = clock.warm_up(timed, inputs)
        for n in (2, 0, 1):
            assert clock.seconds(warm, n) > 1e-6
            torch.cuda.synchronize()
            assert (out == out[0]).all()
            assert out[0] == n or warm.calls > 1  # a chain ends with another
