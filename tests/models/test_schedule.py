from types import SimpleNamespace

import pytest
import torch

from vstar_kernels.models.schedule import StepGate, Turns, find_step

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, in schedulers
STEPS = 25
FIRST_ORDER = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]
SECOND_ORDER = [
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
]


def scheduler_of(name, steps=STEPS):
    settings = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def gate(steps, scheduler=None):
    return StepGate(steps, lambda model: scheduler)


def loop(scheduler, visit, timesteps=None):
    """The denoising loop of every pipeline, with a model that returns zeros."""
    sample = torch.zeros(1, 4, 2, 2)
    for timestep in scheduler.timesteps if timesteps is None else timesteps:
        scheduler.scale_model_input(sample, timestep)
        visit(timestep)
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_steps_are_counted_from_0(name):
    scheduler, seen = scheduler_of(name), []
    loop(scheduler, lambda t: seen.append(find_step(t, scheduler)))
    if name == "PNDMScheduler":  # visits the second timestep twice
        assert seen == [0, 1, *range(1, STEPS)]
    else:
        assert seen == list(range(STEPS))


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_steps_are_not_counted_twice(name):
    scheduler, seen = scheduler_of(name), []
    loop(scheduler, lambda t: seen.append(find_step(t, scheduler)))
    assert seen == [i // 2 for i in range(2 * STEPS - 1)]


@pytest.mark.parametrize("name", FIRST_ORDER + SECOND_ORDER)
def test_a_restarted_loop_starts_at_0(name):
    """FreeInit runs the loop several times."""
    scheduler, seen = scheduler_of(name, 5), []
    for _ in range(3):
        scheduler.set_timesteps(5)
        loop(scheduler, lambda t: seen.append(find_step(t, scheduler)))
    assert seen == seen[: len(seen) // 3] * 3
    assert seen[0] == 0


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_a_schedule_entered_late_keeps_its_indices(name):
    """img2vid's strength."""
    scheduler, seen = scheduler_of(name), []
    begin = 5 * scheduler.order
    if name != "DDIMScheduler":
        scheduler.set_begin_index(begin)
    loop(scheduler, lambda t: seen.append(find_step(t, scheduler)), scheduler.timesteps[begin:])
    assert (seen[0], seen[-1]) == (5, STEPS - 1)


def test_a_late_entry_after_the_last_regularized_step_is_an_error():
    scheduler = scheduler_of("EulerDiscreteScheduler")
    scheduler.set_begin_index(14)
    with pytest.raises(ValueError, match=r"regularizes no step: .* entered at step 14"):
        gate(13, scheduler).is_on(None, scheduler.timesteps[14])
    with pytest.raises(ValueError, match="regularizes no step"):
        gate(0.5, scheduler).is_on(None, scheduler.timesteps[14])
    assert not gate(lambda step, t: False, scheduler).is_on(None, scheduler.timesteps[14])
    scheduler.set_begin_index(13)
    assert gate(13, scheduler).is_on(None, scheduler.timesteps[13])
    assert not gate(13, scheduler).is_on(None, scheduler.timesteps[14])


@pytest.mark.parametrize("guidance", [1, 2, 3])
def test_batched_timesteps(guidance):
    scheduler = scheduler_of("DDIMScheduler")
    assert find_step(scheduler.timesteps[7].expand(guidance), scheduler) == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_timesteps_in_the_models_type(dtype):
    # Timesteps 40 apart: bfloat16 has 8 bits, so that its 960 may be off by 4.
    scheduler = scheduler_of("DDIMScheduler")
    steps = [find_step(t.to(dtype), scheduler) for t in scheduler.timesteps]
    assert steps == list(range(STEPS))


def test_fractional_timesteps():
    """SVD's: a quarter of the logarithm of σ."""
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    )
    scheduler.set_timesteps(STEPS)
    assert [find_step(t, scheduler) for t in scheduler.timesteps] == list(range(STEPS))


@pytest.mark.parametrize(
    ("steps", "on"),
    [(0, 1), (13, 14), (24, 25), (99, 25), (0.56, 14), (0.5, 13), (1.0, 25), (0.001, 1)],
)
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"]
)
def test_index_and_share(steps, on, name):
    scheduler, seen = scheduler_of(name), []
    step_gate = gate(steps, scheduler)
    loop(scheduler, lambda t: seen.append(step_gate.is_on(None, t)))
    calls = min(on * scheduler.order, len(scheduler.timesteps))
    assert seen == [True] * calls + [False] * (len(seen) - calls)


def test_a_predicate_gets_step_and_timestep():
    scheduler, seen = scheduler_of("DDIMScheduler", 4), []
    step_gate = gate(lambda step, timestep: seen.append((step, timestep)) or step % 2, scheduler)
    assert [step_gate.is_on(None, t) for t in scheduler.timesteps] == [False, True, False, True]
    assert seen == list(enumerate(map(float, scheduler.timesteps)))


def test_all_steps_need_no_schedule():
    assert gate(None).is_on(None, None)


def test_announced_steps():
    step_gate = gate(13)
    assert step_gate.is_on(None, 999, step=13)
    assert not step_gate.is_on(None, 999, step=14)
    step_gate.announced.set(14)
    assert not step_gate.is_on(None, 999, step=13)


class Schedule:
    def __init__(self, timesteps):
        self.timesteps = timesteps


@pytest.mark.parametrize(
    ("schedule", "timestep", "message"),
    [
        (None, 1, "needs the step of each forward pass: give the scheduler="),
        (Schedule(None), 1, "has no timesteps yet: call its set_timesteps"),
        (Schedule(torch.tensor([])), 1, "has no timesteps yet"),
        (Schedule([9, 5, 1]), 4, "timestep 4 is not in the scheduler's timesteps .9, 5, 1."),
        (Schedule([9, 5, 1]), float("nan"), "timestep nan is not in"),
        (Schedule([9, 5, 1]), None, "called without a timestep"),
        (Schedule([9, 5, 1]), torch.tensor([9, 5]), "must be at one timestep .* got 5, 9"),
    ],
)
def test_errors(schedule, timestep, message):
    with pytest.raises(ValueError, match=message):
        gate(13, schedule).is_on(None, timestep)


def test_a_share_of_an_unknown_schedule():
    with pytest.raises(ValueError, match=r"steps=0\.5 is a share of the schedule: give"):
        gate(0.5).is_on(None, 1, step=3)


def test_sides_of_guidance_end_with_the_run_and_where_they_are_forgotten():
    turns, sample, other = Turns(), torch.randn(1, 2), torch.randn(1, 2)
    runs = [SimpleNamespace(timesteps=torch.tensor([9, 5])) for _ in range(2)]
    calls = [(9, sample, 0), (9, sample, 0), (5, sample, 0), (5, other, 0), (5, other, 0),
             (5, other, 1), (5, other, None), (5, other, None)]  # fmt: skip
    found = [turns.branch(t, x, None if run is None else runs[run]) for t, x, run in calls]
    assert found == [0, 1, 0, 0, 1, 0, 0, 1]
    runs[0].timesteps = torch.tensor([9, 5])
    turns.branch(9, sample, runs[0])
    runs[0].timesteps = torch.tensor([9, 5])  # the same video again
    assert turns.branch(9, sample, runs[0]) == 0
    turns.forget()
    assert turns.branch(9, sample, runs[0]) == 0
    assert turns.branch(9, sample, runs[0]) == 1
