"""PyTorch's transformations of the operations and of scaled_dot_product_attention, as a table.

    python -m tests.attention.transformations [--packages] [--write]

prints the table of docs/operation.md from a run, and ``--write`` puts it there. ``--packages``,
which ``--write`` implies, runs AOTInductor too, whose compiler takes a minute. Each row is a
function that runs a transformation with an operation and compares what comes out with the formula
in float64. A wrong number ends the run; an error is a number in the table, of a note that says
why, and ends the run too where there is no such note.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import vstar_kernels as vk

PAGE = Path(__file__).parents[2] / "docs/operation.md"
FRAMES, TOKENS, HEADS, HEAD_DIM = 3, 2, 2, 8
LAYOUT = vk.Layout(vk.Frames(FRAMES, TOKENS))
RULE = vk.FrameRule.tar(1.0)
START, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Operation:
    """Attention of ``(batch, tokens, heads, head_dim)``, and its formula for float64."""

    name: str
    attend: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    seen: str  # the operator that modes and graphs see


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    given = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*given, **options).transpose(1, 2)


def _sdpa_formula(*tensors: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _sdpa(*tensors)


def _tar(*tensors: Tensor, **options: Any) -> Tensor:
    return vk.tar_attention(*tensors, vk.GaussianBias(1.0), **options)


def _frames(*tensors: Tensor, **options: Any) -> Tensor:
    return vk.frame_attention(*tensors, LAYOUT, RULE, **options)


def _columns(*tensors: Tensor, **options: Any) -> Tensor:
    """The output and, beside it, the maps of the second and the last key."""
    keys = FRAMES * TOKENS if tensors[1].is_nested else tensors[1].shape[1]
    weights = torch.eye(keys, device=tensors[0].device)[:, [1, -1]]
    out, maps = vk.column_attention(*tensors, weights, **options)
    return torch.cat([out, maps.to(out)[:, :, None].expand(*out.shape[:3], 2)], -1)


def _operation(attend: Callable[..., Tensor], name: str, seen: str) -> Operation:
    return Operation(name, attend, lambda *x: attend(*x, backend="reference"), seen)


OPERATIONS = (
    _operation(_tar, "tar_attention", "vstar_kernels::attention"),
    _operation(_frames, "frame_attention", "vstar_kernels::frame_attention"),
    _operation(_columns, "column_attention", "vstar_kernels::column_attention"),
    Operation("SDPA", _sdpa, _sdpa_formula, "aten::_scaled_dot_product_flash_attention_for_cpu"),
)
Row = Callable[[Operation], None]
ROWS: dict[str, Row] = {}
PACKAGES: set[str] = set()  # rows that a compiler of C++ is needed for


def row(name: str, *, packages: bool = False) -> Callable[[Row], Row]:
    """Enters a function as a row of the table."""

    def enter(function: Row) -> Row:
        ROWS[name] = function
        if packages:
            PACKAGES.add(name)
        return function

    return enter


def inputs(*lead: int, seed: int = 0, batch: int = 2) -> list[Tensor]:
    """Returns query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, batch, FRAMES * TOKENS, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def near(found: Any, expected: Any) -> None:
    """Raises unless numbers are those of the formula, and not all zero."""
    for one, other in zip(_leaves(found), _leaves(expected), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=1e-4)


def _leaves(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [x for y in found for x in _leaves(y)]


def _double(tensors: Any) -> list[Tensor]:
    return [x.detach().double() for x in tensors]


def _gradients(function: Callable[..., Tensor], tensors: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    function(*leaves).square().sum().backward()
    return tuple(x.grad for x in leaves if x.grad is not None)


# ---- autograd ----


@row("gradients")
def _(op: Operation) -> None:
    tensors = inputs()
    near(_gradients(op.attend, tensors), _gradients(op.exact, _double(tensors)))


@row("gradients of gradients (`create_graph`)")
def _(op: Operation) -> None:
    def twice(function: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        query = tensors[0].clone().requires_grad_()
        out = function(query, *tensors[1:])
        (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), query)[0]

    tensors = inputs()
    near(twice(op.attend, tensors), twice(op.exact, _double(tensors)))


@row("batched gradients (`is_grads_batched`, `jacobian(vectorize=True)`)")
def _(op: Operation) -> None:
    def jacobian(function: Callable[..., Tensor], tensors: list[Tensor], fast: bool) -> Tensor:
        run = lambda q: function(q, *tensors[1:]).sum(-1)  # noqa: E731
        return torch.autograd.functional.jacobian(run, tensors[0], vectorize=fast)

    tensors = inputs(batch=1)
    near(jacobian(op.attend, tensors, True), jacobian(op.exact, _double(tensors), False))


@row("forward mode (`forward_ad`, dual tensors)")
def _(op: Operation) -> None:
    tensors, tangents = inputs(), inputs(seed=1)
    with forward_ad.dual_level():
        pairs = zip(tensors, tangents, strict=True)
        duals = [forward_ad.make_dual(x, tangent) for x, tangent in pairs]
        found = forward_ad.unpack_dual(op.attend(*duals)).tangent
    assert found is not None, "the tangent was dropped"
    near(found, torch.func.jvp(op.exact, tuple(_double(tensors)), tuple(_double(tangents)))[1])


@row("hooks on saved tensors (`save_on_cpu`)")
def _(op: Operation) -> None:
    tensors = inputs()
    with torch.autograd.graph.save_on_cpu():
        found = _gradients(op.attend, tensors)
    near(found, _gradients(op.exact, _double(tensors)))


@row("activation checkpointing, reentrant and not")
def _(op: Operation) -> None:
    tensors = inputs()
    expected = _gradients(op.exact, _double(tensors))
    for reentrant in (True, False):
        run = lambda *x, r=reentrant: checkpoint(op.attend, *x, use_reentrant=r)  # noqa: E731
        near(_gradients(run, tensors), expected)


@row("selective checkpointing that keeps the operation's results")
def _(op: Operation) -> None:
    kept = []

    def policy(ctx: Any, called: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        mine = called._schema.name == op.seen
        kept.append(mine)
        return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE

    tensors = inputs()
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    found = _gradients(
        lambda *x: checkpoint(op.attend, *x, use_reentrant=False, context_fn=contexts), tensors
    )
    assert any(kept)
    near(found, _gradients(op.exact, _double(tensors)))


# ---- torch.func ----


@row("`torch.func.grad`, `vjp`, `jacrev`")
def _(op: Operation) -> None:
    tensors = inputs()
    run = lambda f: torch.func.grad(lambda *x: f(*x).square().sum(), (0, 1, 2))  # noqa: E731
    near(run(op.attend)(*tensors), run(op.exact)(*_double(tensors)))
    tensors = inputs(batch=1)
    near(torch.func.jacrev(op.attend)(*tensors), torch.func.jacrev(op.exact)(*_double(tensors)))


@row("`torch.func.jvp`, `jacfwd`")
def _(op: Operation) -> None:
    tensors, tangents = tuple(inputs()), tuple(inputs(seed=1))
    found = torch.func.jvp(op.attend, tensors, tangents)
    near(found, torch.func.jvp(op.exact, tuple(_double(tensors)), tuple(_double(tangents))))


@row("`torch.func.hessian` (forward over reverse)")
def _(op: Operation) -> None:
    tensors = inputs(batch=1)
    run = lambda f: torch.func.hessian(lambda *x: f(*x).square().sum())  # noqa: E731
    near(run(op.attend)(*tensors), run(op.exact)(*_double(tensors)))


@row("`vmap`: all mapped, some mapped, nested")
def _(op: Operation) -> None:
    many = inputs(2, 3)
    near(torch.vmap(torch.vmap(op.attend))(*many), torch.vmap(torch.vmap(op.exact))(*_double(many)))
    one = [x[0] if i == 1 else x for i, x in enumerate(many)]
    run = lambda f: torch.vmap(torch.vmap(f), in_dims=(0, None, 0))  # noqa: E731
    near(run(op.attend)(*one), run(op.exact)(*_double(one)))


@row("`vmap` of `grad`, `grad` of `vmap`")
def _(op: Operation) -> None:
    many = inputs(3)
    loss = lambda f: lambda *x: f(*x).square().sum()  # noqa: E731
    expected = torch.vmap(torch.func.grad(loss(op.exact)))(*_double(many))
    near(torch.vmap(torch.func.grad(loss(op.attend)))(*many), expected)
    near(torch.func.grad(lambda *x: torch.vmap(loss(op.attend))(*x).sum())(*many), expected)


@row("`torch.func.functionalize`")
def _(op: Operation) -> None:
    tensors = inputs()
    near(torch.func.functionalize(op.attend)(*tensors), op.exact(*_double(tensors)))


@row("`torch.func.functional_call`")
def _(op: Operation) -> None:
    module, x = Layer(op), torch.randn(2, FRAMES * TOKENS, HEADS * HEAD_DIM)
    weights = {name: 2 * p.detach() for name, p in module.named_parameters()}
    other = copy.deepcopy(module)
    other.load_state_dict(weights)
    loss = lambda w: torch.func.functional_call(module, w, (x,)).square().sum()  # noqa: E731
    near(loss(weights), other(x).square().sum())
    expected = torch.autograd.grad(other(x).square().sum(), list(other.parameters()))
    near(list(torch.func.grad(loss)(weights).values()), expected)


# ---- graphs ----


class Layer(torch.nn.Module):
    """A layer as models have them."""

    def __init__(self, op: Operation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.project = op.attend, torch.nn.Linear(HEADS * HEAD_DIM, 48)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) → the same tokens."""
        given = self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
        return self.attend(*given).flatten(-2)


@row("`make_fx`: one operation in the graph")
def _(op: Operation) -> None:
    tensors = inputs()
    graph = make_fx(lambda query, key, value: op.attend(query, key, value))(*tensors)
    assert op.seen in {getattr(x.target, "_schema", x).name for x in graph.graph.nodes}
    other = inputs(seed=1)
    near(graph(*other), op.exact(*_double(other)))


@row("`torch.compile(fullgraph=True)` with gradients")
def _(op: Operation) -> None:
    torch._dynamo.reset()
    tensors = inputs()
    compiled = torch.compile(op.attend, fullgraph=True, backend="aot_eager")
    near(_gradients(compiled, tensors), _gradients(op.exact, _double(tensors)))


def _without_recompiling(op: Operation, shapes: list[tuple[int, int, int]]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op.attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for batch, tokens, heads in shapes:
            tensors = [torch.randn(batch, tokens, heads, HEAD_DIM) for _ in range(3)]
            near(compiled(*tensors), op.exact(*_double(tensors)))


@row("other batches and heads in the same graph (`dynamic=True`)")
def _(op: Operation) -> None:
    _without_recompiling(op, [(b, FRAMES * TOKENS, h) for b, h in ((5, 3), (5, 2), (4, 3))])


@row("other lengths in the same graph (`dynamic=True`)")
def _(op: Operation) -> None:
    _without_recompiling(op, [(5, tokens, 3) for tokens in (6, 7, 16)])


def _exported(op: Operation) -> tuple[Any, Layer, Tensor]:
    module, x = Layer(op).eval(), torch.randn(3, FRAMES * TOKENS, HEADS * HEAD_DIM)
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(module, (x,), dynamic_shapes=({0: batch},)), module, x


@row("`torch.export`, saved and loaded, with another batch")
def _(op: Operation) -> None:
    program, module, x = _exported(op)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for given in (x, x[:2]):
        near(loaded(given), module(given))


@row("exported and lowered to operators without Python")
def _(op: Operation) -> None:
    program, module, x = _exported(op)
    lowered = program.run_decompositions({} if op.name == "SDPA" else vk.backends.decompositions())
    called = str([x.target for x in lowered.graph.nodes])
    assert "vstar_kernels.attention" not in called
    for given in (x, x[:2]):
        near(lowered.module()(given), module(given))


@row("a package of AOTInductor, run without this package's Python", packages=True)
def _(op: Operation) -> None:
    program, module, x = _exported(op)
    if op.name != "SDPA":
        program = program.run_decompositions(vk.backends.decompositions())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "m.pt2"))
        torch.save([(y, module(y).detach()) for y in (x, x[:2])], folder / "cases.pt")
        command = [sys.executable, "-c", PACKAGE, name, str(vk.backends.native_library())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=name, timeout=300)
        assert done.returncode == 0, done.stderr


# What a program in C++ does: loads the library, has it define its operators, loads the package.
PACKAGE = """
import ctypes, sys, torch
folder, library = sys.argv[1:]
torch.ops.load_library(library)
define = ctypes.CDLL(library).vstar_kernels_define_operators
assert define() == define() == 0
model = torch._inductor.aoti_load_package(f"{folder}/m.pt2")
for x, expected in torch.load(f"{folder}/cases.pt"):
    torch.testing.assert_close(model(x), expected)
assert "vstar_kernels" not in sys.modules
"""


# ---- devices, types and those who watch ----


@row("meta and fake tensors")
def _(op: Operation) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    expected = op.attend(*inputs())
    with FakeTensorMode():
        made = op.attend(*(torch.empty(x.shape) for x in inputs()))
    meta = op.attend(*(x.to("meta") for x in inputs()))
    for found in (made, meta):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@row("autocast")
def _(op: Operation) -> None:
    tensors = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = op.attend(*tensors)
    assert found.dtype == torch.bfloat16
    expected = op.exact(*(x.bfloat16().double() for x in tensors))
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


@row("nested tensors (jagged)")
def _(op: Operation) -> None:
    def nested(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor([x[0], x[1, :4]], layout=torch.jagged)

    tensors = inputs()
    near(op.attend(*map(nested, tensors)).unbind()[0], op.exact(*_double(tensors))[0])


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@row("a `TorchDispatchMode` sees one operation, and one backward")
def _(op: Operation) -> None:
    with _Seen() as seen:
        _gradients(op.attend, inputs())
    assert seen.names.count(op.seen) == 1
    assert sum(x.startswith(op.seen) and x.endswith("backward") for x in seen.names) == 1


@row("`FlopCounterMode` counts it, forward and backward")
def _(op: Operation) -> None:
    tensors = inputs()
    counter = FlopCounterMode(display=False)
    # Of the kernels of SDPA on a CPU it knows no formula.
    formula = sdpa_kernel(SDPBackend.MATH) if op.name == "SDPA" else contextlib.nullcontext()
    with counter, formula:
        _gradients(op.attend, tensors)
    per_product = 2 * tensors[0].numel() * FRAMES * TOKENS
    products = 6 if op.name == "SDPA" else 7
    assert counter.get_total_flops() == products * per_product


@row("the profiler names it")
def _(op: Operation) -> None:
    with torch.profiler.profile() as profile:
        _gradients(op.attend, inputs())
    names = {x.key for x in profile.key_averages()}
    expected = {op.seen, f"{op.seen}_backward"}
    if op.name != "SDPA":
        expected = {f"{op.name}{x} (cpu)" for x in ("", " backward")}
    assert expected <= names


# ---- what is not there, and why ----


@dataclass(frozen=True)
class Note:
    """Why some rows' transformations of some operations raise, and what their error says."""

    rows: str  # what their names match
    operations: tuple[str, ...]
    error: str
    text: str


OURS = ("tar_attention", "frame_attention", "column_attention")
NOTES = (
    Note(
        "gradients of gradients",
        (*OURS, "SDPA"),
        "have no second derivative|backward is not implemented",
        'Fused kernels have no second derivative, ours and PyTorch\'s. `backend="reference"` has '
        "one, and so has PyTorch's `SDPBackend.MATH`. `hessian` needs none: it is a forward-mode "
        "derivative of a gradient.",
    ),
    Note(
        "forward mode|jvp|hessian",
        ("SDPA",),
        "Trying to use forward AD with _scaled_dot_product_flash_attention_for_cpu",
        "PyTorch's kernels have no forward-mode derivative, and ours neither. Where a tensor "
        "carries a tangent our operations leave the call to the reference, with a warning; SDPA "
        "has to be told, by `sdpa_kernel(SDPBackend.MATH)`.",
    ),
    Note(
        "other lengths",
        ("frame_attention",),
        "Recompiling function _frames",
        "A `Layout` says which frame each token belongs to, and the rule's tables are made from "
        "it: both are constants of a graph, and another layout is another graph. Batches, heads "
        "and the lengths of the other operations are not.",
    ),
    Note(
        "nested tensors",
        OURS,
        "must be an ordinary .strided. tensor, got a nested one",
        "Sequences of different lengths in one call are for texts. All videos of a batch have as "
        "many frames; `frame_attention` takes `key_lengths` for texts that are padded. Nested "
        "tensors are refused, not padded without a word.",
    ),
)


def run(name: str, op: Operation) -> str:
    """Returns a cell of the table: "yes", or the number of the note that says why not.

    Raises:
        AssertionError: A number is wrong, or there is an error that no note explains.
    """
    noted = [x for x in NOTES if re.search(x.rows, name) and op.name in x.operations]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ROWS[name](op)
    except AssertionError:
        if not noted:
            raise
        found = "AssertionError"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    else:
        assert not noted, f"{name} of {op.name} is there, and a note says why not"
        return "yes"
    for note in noted:
        if re.search(note.error, found):
            return f"({NOTES.index(note) + 1})"
    raise AssertionError(f"{name} of {op.name}: {found}")


def line(name: str) -> str:
    """Returns the table's line of a row."""
    return f"| {name} | {' | '.join(run(name, op) for op in OPERATIONS)} |"


def heading() -> list[str]:
    """Returns the first two lines of the table."""
    names = ["`tar_attention`", "`frame_attention`", "`column_attention`", "SDPA"]
    return [f"| | {' | '.join(names)} |", "|---" * 5 + "|"]


def notes() -> list[str]:
    """Returns the notes under the table."""
    return [f"{number}. {note.text}" for number, note in enumerate(NOTES, 1)]


def torch_version() -> str:
    """Returns the version of torch that a table is of."""
    return f"With torch {'.'.join(torch.__version__.split('.')[:2])}, on a CPU."


def main() -> None:
    """Prints the table, and with --write puts it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", action="store_true", help="compile packages too")
    parser.add_argument("--write", action="store_true", help="put the table into docs/operation.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [x for x in ROWS if options.packages or options.write or x not in PACKAGES]
    lines = [torch_version(), "", *heading()]
    print("\n".join(lines))
    for name in names:
        lines.append(line(name))
        print(lines[-1], flush=True)
    lines += ["", *notes()]
    text = "\n".join(lines)
    print("\n".join(lines[-1 - len(NOTES) :]))
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(START)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
