"""One model whose frames are spread over processes: its call, and what in it is over frames.

The model is called with all frames, as if nothing was done to it, and returns all frames. Inside
of its hooks, where its own ``forward`` begins, this process's frames are taken. Blocks that attend
over frames are given some positions of all frames instead, by one all-to-all, and give them back by
another: queries, keys, values and all that is between are computed where the positions are, so that
attention, its regularization and its positions are those of one process, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_kernels.attention.call import autocasts
from vstar_kernels.models.forwards import ForwardPasses
from vstar_kernels.models.front_end import temporal_layers
from vstar_kernels.models.hooks import Argument, Hooks, put_back
from vstar_kernels.models.positions import put_part_on, take_part_off
from vstar_kernels.models.replaced_forward import own_forward
from vstar_kernels.models.sharded.families import RESIDUALS, Family, Stack
from vstar_kernels.models.sharded.moves import (
    gather_frames,
    share,
    stack_all,
    take_frames,
    to_frames,
    to_positions,
    with_neighbours,
)
from vstar_kernels.models.sharded.parts import SpreadPass, keep_passes
from vstar_kernels.models.sharded.ranks import Ranks

# Arguments of temporal blocks that may have a row for each position.
BY_POSITION = ("timestep", "encoder_hidden_states", "attention_mask", "mask", "context")
DIMS = 5  # of arguments, at most
SAMPLED = 16  # numbers of an argument, to see that all processes have the same
IMAGE_TOKENS = 77, 16  # DynamiCrafter's context: of text, and of the image for each frame


class SpreadForward:
    """A ``forward`` in the place of a module's own.

    Args:
        module: The module.
        call: Is called with the forward that was there before, and the arguments.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module, self._call = module, call
        self.previous: Callable[..., Any] = module.forward
        self._replaced = vars(module).get("forward")
        self.is_on = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls what it was given, or what was there before once it is off."""
        if not self.is_on:
            return self.previous(*args, **kwargs)
        return self._call(self.previous, *args, **kwargs)

    def put_on(self) -> None:
        """Puts it in."""
        self.module.forward = self

    def take_off(self) -> None:
        """Puts back what was there; where somebody has put another over it, it does nothing."""
        self.is_on = False
        if vars(self.module).get("forward") is self:
            if self._replaced is None:
                del self.module.forward
            else:
                self.module.forward = self._replaced

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies the class's own forward: the copy of a model has all frames."""
        return own_forward, (self.module,)


class ShardedModel:
    """The frames of one model, spread over processes.

    Args:
        model: The model.
        family: What is known of it.
        ranks: The processes.
        gathers: Whether its outputs are those of all frames, in every process.
    """

    def __init__(self, model: nn.Module, family: Family, ranks: Ranks, *, gathers: bool) -> None:
        if isinstance(vars(model).get("forward"), SpreadForward):
            raise ValueError(
                f"this {type(model).__name__} is under shard_frames already: remove() that handle "
                "first"
            )
        self.model, self._family, self._ranks, self._gathers = model, family, ranks, gathers
        self._sample = Argument(model, 0)
        self._passes: ForwardPasses[SpreadPass] = ForwardPasses(
            f"shard_frames was removed from this {type(model).__name__} while it ran"
        )
        self._hooks = Hooks()
        self._forwards: list[SpreadForward] = []
        self._treated: WeakSet[nn.Module] = WeakSet()
        self._removed = False
        self._halo = 0
        self._stacks: list[Stack] = []

    def install(self) -> None:
        """Puts in what is to happen around the model's own forward, and in it."""
        keep_passes(self.model, self._passes)
        self._replace(self.model, self._forward)
        if self._family.name == "LatteTransformer3DModel":
            put_part_on(self.model, "temp_pos_embed", self._passes.current)
        self._treat()

    def remove(self) -> None:
        """Takes everything off; nothing happens the second time."""
        put_back(
            self._close,
            self._hooks.remove,
            *(forward.take_off for forward in self._forwards),
            lambda: take_part_off(self.model, "temp_pos_embed"),
            lambda: keep_passes(self.model, None),
        )

    def _close(self) -> None:
        self._removed = True
        self._passes.close()

    def _replace(self, module: nn.Module, call: Callable[..., Any]) -> None:
        forward = SpreadForward(module, call)
        self._forwards.append(forward)  # first, so that it can be undone at any time
        forward.put_on()

    # ---- what is put in ----

    def _treat(self) -> None:
        """Treats what is over frames and has not been: much in diffusers replaces modules."""
        if self._stacks and all(stack.is_in(self.model) for stack in self._stacks):
            return
        stacks = self._stacks = list(self._family.find_stacks(self.model))
        for layer in temporal_layers(self.model):
            if not any(f"{layer.name}.".startswith(f"{stack.name}.") for stack in stacks):
                raise ValueError(
                    f"{layer.name} attends over frames where shard_frames does not know that "
                    f"{self._family.name} does"
                )
        for stack in stacks:
            if stack.first not in self._treated:
                self._hooks.before(stack.first, self._enter(stack))
                self._hooks.after(stack.last, self._leave(stack))
                self._treated.add(stack.first)
        for name, module in self.model.named_modules():
            if module in self._treated:
                continue
            if isinstance(module, nn.GroupNorm):
                self._check_bare(name, module)
                self._replace(module, self._normalise(module))
            elif isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                self._check_bare(name, module)
                self._replace(module, self._convolve(name, module))
            elif name.endswith(".time_proj"):
                # Stable Video Diffusion's, of the numbers of the frames.
                if self._family.name == "UNetSpatioTemporalConditionModel":
                    self._hooks.before(module, self._number)
            elif name == "image_latents_context_embedding":
                self._hooks.before(module, self._give_first_image)
            else:
                continue
            self._treated.add(module)

    @staticmethod
    def _check_bare(name: str, module: nn.Module) -> None:
        if "forward" in vars(module):
            raise ValueError(
                f"{name}, a {type(module).__name__} that may be over frames, has a forward of its "
                "own (sequential or group offloading, layerwise casting), which shard_frames would "
                "replace"
            )

    # ---- the model ----

    def _forward(self, previous: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._treat()
        forward = self._make_pass(args, kwargs)
        args, kwargs = self._take(forward, args, kwargs)
        outer, failed = self._passes.enter(), True
        try:
            self._passes.begin(forward)
            out = previous(*args, **kwargs)
            failed = False
        finally:
            self._passes.leave(outer, failed=failed)
        return self._gather(forward, out)

    def _make_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SpreadPass:
        """Returns the part of this process, after a look at what the others have been given.

        Raises:
            ValueError: There are too few frames, or processes have been given different latents.
        """
        family, sample = self._family, self._sample.get(args, kwargs)
        for name in family.refused:
            if Argument(self.model, name).get(args, kwargs):
                raise ValueError(f"shard_frames does not take {name}")
        dim = family.frames[family.sample]
        frames, size = sample.shape[dim], self._ranks.size
        fewest = frames // size
        if fewest < max(1, self._halo):
            raise ValueError(
                f"{frames} frames are too few for {size} processes: each needs at least "
                f"{max(1, self._halo)}"
            )
        given = {
            name: self._argument(name).get(args, kwargs)
            for name in (*family.frames, *family.shared, *family.rows)
            if name not in RESIDUALS  # which a model may have left spread
        }
        given = {name: x for name, x in given.items() if isinstance(x, Tensor) and not x.is_meta}
        if given:
            self._check_same(given)
        return SpreadPass(self._ranks, len(sample), frames)

    def _argument(self, name: str) -> Argument:
        # lvdm's latents are called x by us, whatever they are called there.
        return self._sample if name == self._family.sample else Argument(self.model, name)

    def _check_same(self, given: dict[str, Tensor]) -> None:
        numbers = torch.zeros(len(given), DIMS + SAMPLED)
        for row, x in zip(numbers, given.values(), strict=True):
            row[: x.ndim] = torch.tensor(x.shape)
            some = x.detach().reshape(-1)[:: max(1, x.numel() // SAMPLED)][:SAMPLED]
            row[DIMS : DIMS + len(some)] = some.float().cpu()
        device = next(iter(given.values())).device
        every = stack_all(numbers.to(device), self._ranks, "check").cpu()
        for rank, theirs in enumerate(every):
            for name, one, first in zip(given, theirs, every[0], strict=True):
                # Text encoders on other processors differ a little, shapes do not.
                are_close = torch.allclose(one, first, rtol=1e-2, atol=1e-2, equal_nan=True)
                if not (are_close and torch.equal(one[:DIMS], first[:DIMS])):
                    raise ValueError(
                        f"processes 0 and {rank} call {type(self.model).__name__} with different "
                        f"{name}, of which each is to compute a part: give all of them the same "
                        "prompt, sizes and seed (generator=torch.Generator().manual_seed(0); "
                        "torch.manual_seed for what a pipeline draws without one)"
                    )

    def _take(
        self, forward: SpreadPass, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the call with this process's frames of everything."""
        family = self._family
        changes: dict[str, Callable[[Any], Any]] = {
            **{
                name: functools.partial(take_frames, dim=dim, spread=forward)
                for name, dim in family.frames.items()
            },
            **{name: functools.partial(self._take_rows, forward, name) for name in family.rows},
            **dict.fromkeys(family.shared, functools.partial(share, spread=forward)),
        }
        for name, change in changes.items():
            argument = self._argument(name)
            value = argument.get(args, kwargs)
            if value is None:
                continue
            if name == "image_latents":
                forward.first_image = share(value[:, :, 0], forward)
            args, kwargs = argument.replace(args, kwargs, change(value))
        return args, kwargs

    def _take_rows(self, forward: SpreadPass, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._take_rows(forward, name, x) for x in value)
        rows, batch = len(value), forward.batch
        if name == "context" and value.shape[1] == IMAGE_TOKENS[0] + IMAGE_TOKENS[1] * (
            forward.frames
        ):
            raise ValueError(
                f"{name} has tokens of an image for each frame (DynamiCrafter), which shard_frames "
                "does not take apart"
            )
        if rows == batch * forward.frames:
            return forward.of_frames(value)
        if name in RESIDUALS and rows == batch * forward.count:
            return value  # of a SparseControlNetModel whose frames are spread in the same way
        if rows == batch:
            return share(value, forward)
        raise ValueError(
            f"{name} must have a row for each of {batch} · {forward.frames} frames, or for each "
            f"video, got shape {tuple(value.shape)}"
        )

    def _gather(self, forward: SpreadPass, out: Any) -> Any:
        if not self._gathers:
            return out
        if self._family.returns_rows:
            return _mapped(out, lambda rows: self._gather_rows(forward, rows))
        dim = self._family.frames[self._family.sample]
        if isinstance(out, Tensor):
            return gather_frames(out, dim, forward)
        if isinstance(out, tuple):
            return (gather_frames(out[0], dim, forward), *out[1:])
        whole = copy.copy(out)  # diffusers' output, or whatever has a sample
        whole.sample = gather_frames(out.sample, dim, forward)
        return whole

    @staticmethod
    def _gather_rows(forward: SpreadPass, rows: Tensor) -> Tensor:
        by_video = rows.unflatten(0, (forward.batch, forward.count))
        return gather_frames(by_video, 1, forward).flatten(0, 1)

    # ---- what is over frames ----

    def _enter(self, stack: Stack) -> Callable[..., Any]:
        hidden = Argument(stack.first, 0)
        others = [Argument(stack.first, name) for name in (*BY_POSITION, "num_frames")]

        def hook(block: nn.Module, args: Any, kwargs: Any = None) -> Any:
            forward = None if kwargs is None or self._removed else self._passes.current()
            if forward is None:
                return None
            x = hidden.get(args, kwargs)
            if stack.rows == "frames":
                x = x.unflatten(0, (forward.batch, forward.count)).transpose(1, 2)
            else:
                x = self._add_position(stack, x, forward)
                if len(x) % forward.batch:
                    raise ValueError(
                        f"{stack.name} was called with a part of the positions (split inference), "
                        "which shard_frames does not take apart"
                    )
                x = x.unflatten(0, (forward.batch, len(x) // forward.batch))
            positions = forward.positions[stack.name] = x.shape[1]
            forward.is_idle = positions <= forward.ranks.rank
            x = to_positions(x, forward)
            x = (x.transpose(1, 2) if stack.rows == "frames" else x).flatten(0, 1)
            args, kwargs = hidden.replace(args, kwargs, x)
            for argument in others:
                value = argument.get(args, kwargs)
                if argument.name == "num_frames" and value is not None:
                    value = forward.frames
                elif (
                    isinstance(value, Tensor)
                    and value.ndim > 1
                    and len(value) == forward.batch * positions
                ):
                    value = forward.of_positions(value)
                else:
                    continue
                args, kwargs = argument.replace(args, kwargs, value)
            return args, kwargs

        return hook

    def _leave(self, stack: Stack) -> Callable[..., Any]:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
            forward = None if output is None or self._removed else self._passes.current()
            if forward is None:
                return None
            by_frames = stack.rows == "frames"
            rows = forward.frames if by_frames else len(output) // forward.batch
            x = output.unflatten(0, (forward.batch, rows))
            x = x.transpose(1, 2) if by_frames else x
            x = to_frames(x, forward.positions[stack.name], forward)
            return (x.transpose(1, 2) if by_frames else x).flatten(0, 1)

        return hook

    def _add_position(self, stack: Stack, x: Tensor, forward: SpreadPass) -> Tensor:
        """Adds Latte's position where the model sees one frame, to which it adds none."""
        is_first = stack.name == "temporal_transformer_blocks.0"  # of Latte
        if is_first and forward.count == 1 < forward.frames:
            table: Any = self.model.temp_pos_embed
            return x + table.to(x.dtype)
        return x

    def _normalise(self, module: nn.GroupNorm) -> Callable[..., Tensor]:
        def call(previous: Callable[..., Tensor], x: Tensor) -> Tensor:
            forward = self._passes.current() if x.ndim == 5 else None
            return previous(x) if forward is None else _group_norm(x, module, forward)

        return call

    def _convolve(self, name: str, module: nn.Conv3d) -> Callable[..., Tensor]:
        halo = module.kernel_size[0] // 2
        over_frames = (
            module.kernel_size[0] % 2,
            module.stride[0],
            module.dilation[0],
            module.padding_mode,
            module.padding[0],
        )
        if over_frames != (1, 1, 1, "zeros", halo):
            raise ValueError(
                f"{name} is a convolution over frames that shard_frames does not know: {module}"
            )
        self._halo = max(self._halo, halo)

        def call(previous: Callable[..., Tensor], x: Tensor) -> Tensor:
            forward = self._passes.current()
            if forward is None:
                return previous(x)
            frames = with_neighbours(x, halo, forward)
            padding: Any = (0, *module.padding[1:])
            return F.conv3d(
                frames, module.weight, module.bias, 1, padding, module.dilation, module.groups
            )

        return call

    def _number(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        forward = None if kwargs is None or self._removed else self._passes.current()
        if forward is None:
            return None
        return (args[0] + forward.first, *args[1:]), kwargs

    def _give_first_image(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        forward = None if kwargs is None or self._removed else self._passes.current()
        if forward is None or forward.first_image is None:
            return None
        return (forward.first_image,), kwargs


def _group_norm(x: Tensor, module: nn.GroupNorm, forward: SpreadPass) -> Tensor:
    """Normalises ``(batch, channels, frames here, …)`` by the statistics of all frames."""
    wide = x if x.dtype == torch.float64 else x.float()
    groups = wide.unflatten(1, (module.num_groups, -1))
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4, 5), correction=0)
    every = stack_all(torch.stack([mean, variance]), forward.ranks, "statistics")
    # (ranks, 2, batch, groups)
    weights = every.new_tensor(forward.counts)[:, None, None] / forward.frames
    # The variance of all is the mean one of the parts and that of their means (Chan et al. 1979).
    mean = (weights * every[:, 0]).sum(0)
    variance = (weights * (every[:, 1] + (every[:, 0] - mean).square())).sum(0)
    factor = (variance + module.eps).rsqrt()
    shift = -mean * factor
    per_group = module.num_channels // module.num_groups
    factor, shift = (v.repeat_interleave(per_group, 1) for v in (factor, shift))
    if module.weight is not None:
        factor, shift = factor * module.weight, shift * module.weight + module.bias
    out = torch.addcmul(shift[..., None, None, None], wide, factor[..., None, None, None])
    return out if autocasts(x) else out.to(x.dtype)


def _mapped(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns outputs, a tensor in a tuple in a dataclass or so, with each tensor changed."""
    if isinstance(out, Tensor):
        return change(out)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        changed = {
            field.name: _mapped(getattr(out, field.name), change)
            for field in dataclasses.fields(out)
        }
        return dataclasses.replace(out, **changed)
    if isinstance(out, list | tuple):
        return type(out)(_mapped(x, change) for x in out)
    return out
