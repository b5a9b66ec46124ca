"""``shard_frames`` spreads the frames of one video over several processes in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vstar_kernels.models.front_end import models_with_temporal_attention
from vstar_kernels.models.full3d.apply import find_full3d
from vstar_kernels.models.hooks import Handle, is_compiled, put_back
from vstar_kernels.models.sharded.families import find_family
from vstar_kernels.models.sharded.model import ShardedModel
from vstar_kernels.models.sharded.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_frames(
    pipe_or_model: Any, mesh: DeviceMesh, *, timeout: float | None = None
) -> ShardedHandle:
    """Spreads the frames of a video over processes, each of which has a GPU or so of its own.

    >>> mesh = torch.distributed.init_device_mesh("cuda", (world_size,))
    >>> with vk.shard_frames(pipe, mesh), vk.apply_tar(pipe, "64D1_32D8"):
    ...     video = pipe(prompt, num_frames=64, generator=torch.Generator().manual_seed(0)).frames

    Every process calls the pipeline in the same way, with the same seed, and gets the whole video.
    Of each call of the denoising model it computes its own frames: N/P of N, or one more. Where the
    model attends over frames, an all-to-all gives each process some positions of all frames, and
    another gives the frames back, so that attention and TAR need nothing of other processes. Group
    normalization over frames has its statistics over all, and temporal convolutions the frames of
    the neighbours.

    It works on diffusers' ``UNetMotionModel`` (AnimateDiff), ``SparseControlNetModel``,
    ``LatteTransformer3DModel``, ``UNet3DConditionModel``, ``I2VGenXLUNet`` and
    ``UNetSpatioTemporalConditionModel``, and on the UNets of lvdm and LaVie, together with
    :func:`vstar_kernels.apply_tar`, :func:`vstar_kernels.condition_frames` and
    :func:`vstar_kernels.capture_maps`, put on in any order: on all processes. What else a pipeline
    holds (text encoders, VAE) is computed by every process for itself.

    The gradient of the latents and of the text is that of the whole video, if every process
    computes the same loss of the whole output. Those of parameters are of this process's frames:
    sum them over the processes.

    Args:
        pipe_or_model: A pipeline, whose every model with temporal attention is treated, or one
            model, not compiled. A ``SparseControlNetModel`` beside its UNet returns this process's
            frames, which the UNet takes.
        mesh: The processes, a one-dimensional ``torch.distributed`` device mesh.
        timeout: How many seconds they may wait for each other, with gloo; None is the time of the
            process group, which is all that others (NCCL) have.

    Returns:
        A handle: a context manager, with ``remove()``.

    Raises:
        TypeError: ``pipe_or_model`` or ``mesh`` is of the wrong kind.
        ValueError: The mesh has several dimensions; there is no temporal attention, or it is of
            a model that is compiled or under ``shard_frames`` already. At a forward pass: there are
            fewer frames than processes, or processes were given different latents.
        RankFailure: At a forward pass: another process has died or does not come; it says which.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            "mesh must be a torch.distributed DeviceMesh, such as init_device_mesh('cuda', (4,)), "
            f"got {type(mesh).__name__}"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh.ndim}: take one, such as mesh['frames']"
        )
    is_time = isinstance(timeout, int | float) and 0 < timeout < math.inf
    if timeout is not None and not is_time:
        raise ValueError(f"timeout must be more than 0 seconds or None, got {timeout!r}")
    models = _models(pipe_or_model)
    for model in models.values():
        find_family(model)  # before the processes watch over each other

    from vstar_kernels.models.sharded.processes import ProcessRanks

    ranks = ProcessRanks(mesh.get_group(), timeout)
    try:
        return spread(models, ranks)
    except BaseException:
        ranks.close()  # nobody has a handle that would
        raise


def _models(pipe_or_model: Any) -> Mapping[str, Any]:
    if find_full3d(pipe_or_model):
        raise ValueError(
            f"{type(pipe_or_model).__name__} is or holds a full-3D transformer, whose tokens "
            "diffusers spreads itself: transformer.enable_parallelism(config="
            "ContextParallelConfig(ulysses_degree=…)), under which apply_frames works"
        )
    models = models_with_temporal_attention(pipe_or_model)
    for name, model in models.items():
        if is_compiled(pipe_or_model, name, model):
            raise ValueError(
                f"a compiled {type(model).__name__} cannot be sharded: torch.compile would trace "
                "the exchanges between processes"
            )
    return models


def spread(models: Mapping[str, Any], ranks: Ranks) -> ShardedHandle:
    """Returns the handle of models whose frames are spread over ``ranks``."""
    families = {name: find_family(model) for name, model in models.items()}
    with_unet = any(not family.returns_rows for family in families.values())
    return ShardedHandle(
        [
            ShardedModel(
                model,
                families[name],
                ranks,
                # What goes from one sharded model into another stays where it is.
                gathers=not (families[name].returns_rows and with_unet),
            )
            for name, model in models.items()
        ],
        ranks,
    )


class ShardedHandle(Handle):
    """Frames that are spread over processes: a context manager, with :meth:`remove`.

    Attributes:
        ranks: The processes, with the bytes that this one has sent: ``ranks.sent``.
    """

    def __init__(self, models: list[ShardedModel], ranks: Ranks) -> None:
        self.ranks = ranks
        self._models = models
        self._install_all(models)

    @property
    def sent(self) -> dict[str, int]:
        """The bytes that this process has sent to others since then, by what for."""
        return dict(self.ranks.sent)

    def remove(self) -> None:
        """Puts everything back as it was; nothing happens the second time."""
        super().remove()
        put_back(*(model.remove for model in self._models), self.ranks.close)
