import pytest
import torch

from benchmarks.cases import Case
from benchmarks.results import ResultsError
from benchmarks.suites import CPU_ELEMENTS, SUITES, WORKLOADS, Selection, plan


def cases(**options):
    tasks = plan(Selection(**{"device": "cpu", "threads": 2, **options})).tasks
    return [task.case for task in tasks if task.allocator != "default"]


def test_bytes_and_operations_by_hand():
    sizes = {"dtype": "bfloat16", "batch": 2, "frames": 16, "heads": 4, "head_dim": 64}
    elements = 2 * 16 * 4 * 64
    forward = Case("short", "forward", **sizes)
    assert forward.bytes == 4 * 2 * elements
    assert forward.flops == 2 * 2 * elements * 16
    assert forward.logits_bytes == 2 * 2 * 4 * 16 * 16
    assert Case("maps", "map", **sizes).bytes == forward.bytes + 4 * 2 * 16 * 16
    backward = Case("backward", "backward", **sizes)
    assert (backward.bytes, backward.flops) == (11 * 2 * elements, 14 * elements * 16)
    step = Case("unet", "step", **sizes)
    assert step.bytes is step.flops is None


@pytest.mark.parametrize("full", [False, True])
def test_every_level_of_every_model_is_measured_once(full):
    found = [case for case in cases(full_rows=full) if case.suite == "short"]
    assert len({case.key for case in found}) == len(found)
    for model, description in WORKLOADS["models"].items():
        for level in description["levels"]:
            for frames in WORKLOADS["frames"]:
                (case,) = (
                    case
                    for case in found
                    for use in case.uses
                    if (use.model, use.level) == (model, str(level["level"]))
                    and case.frames == frames
                )
                assert (case.heads, case.head_dim) == (level["heads"], level["head_dim"])
                if full:
                    assert case.batch == level["rows"]
                else:
                    assert case.batch == level["rows"] or case.elements <= CPU_ELEMENTS
                    one_row = frames * case.heads * case.head_dim
                    assert case.batch == level["rows"] or case.elements > CPU_ELEMENTS - one_row


def test_every_suite_has_cases_and_quick_ones_are_few():
    assert {case.suite for case in cases()} == set(SUITES)
    quick = cases(quick=True)
    assert {case.suite for case in quick} == set(SUITES)
    assert len(quick) < 40
    assert {case.frames for case in cases() if case.suite == "long"} >= {256, 8192}


def test_options_replace_what_a_run_takes():
    found = cases(suites=("short",), models=("latte-512x512",), frames=(7,), dtypes=("float16",))
    assert [case.shape[1:] for case in found] == [(7, 16, 72)]
    assert found[0].torch_dtype == torch.float16
    counts = {case.threads for case in cases(suites=("threads",), threads=6)}
    assert counts == {1, 2, 4, 6}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"models": ("latte",)}, "--models: there is no latte; known: videocrafter2"),
        ({"peers": ("egaer",)}, "--peers: there is no egaer; known: vstar_kernels, eager"),
        ({"suites": ("shrot",)}, "--suites: there is no shrot; known: short, long"),
    ],
)
def test_unknown_names_are_refused(options, text):
    with pytest.raises(ResultsError, match=text):
        cases(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ResultsError, match="--device cuda: torch finds no GPU"):
        cases(device="cuda")
