"""One suite: every case checked, then timed; cases that the time does not reach are named."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

import vstar_kernels as vk
from benchmarks.gpu import contestants
from benchmarks.gpu.check import check
from benchmarks.gpu.environment import environment
from benchmarks.gpu.suites import SUITES, Case
from benchmarks.gpu.timing import compare, random_inputs, sets_needed

ROUNDS = 21
Row = dict[str, Any]


def suite(name: str, seconds: float) -> dict[str, Any]:
    """The rows of a suite, as many as can be begun in so many seconds, and the rest by name."""
    deadline = time.monotonic() + seconds
    rows, left = [], []
    for case in tqdm(SUITES[name](), desc=name, unit="case"):
        if time.monotonic() > deadline:
            left.append(asdict(case))
        else:
            rows.append(measure(case))
    return {"suite": name, "environment": environment(), "rows": rows, "not_reached": left}


def measure(case: Case) -> Row:
    """A case's times by contestant."""
    torch.manual_seed(0)
    shape = (case.batch, case.frames, case.heads, case.head_dim)
    inputs = [random_inputs(shape, torch.bfloat16) for _ in range(sets_needed(case.traffic))]
    bias = vk.GaussianBias(contestants.SIGMA)
    query, key, value = inputs[0]
    out = vk.tar_attention(query, key, value, bias, backend="triton")
    check(out, query, key, value, bias)
    everyone = contestants.everyone(query, case.flex)
    times = compare(everyone, inputs, ROUNDS)
    del everyone, inputs, query, key, value, out
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return {
        **asdict(case),
        "traffic": case.traffic,
        "operations": case.operations,
        "times": {name: asdict(found) for name, found in times.items()},
    }
