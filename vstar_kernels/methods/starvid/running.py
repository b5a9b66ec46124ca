"""What the call of a pipeline that samples says of itself: its prompts, and its guidance.

The model is told neither, and several pipelines may share it. The call is looked for in the call
stack, as its scheduler is (:func:`vstar_kernels.models.schedule.running_pipeline`).
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

from vstar_kernels.models.schedule import running_pipeline


class PipelineRun(NamedTuple):
    """What a pipeline was called with.

    Attributes:
        prompts: None where they are not texts: embeddings, say.
        guided: Whether it is under classifier-free guidance; None where it does not say so.
    """

    prompts: tuple[str, ...] | None = None
    guided: bool | None = None


def running_call(model: nn.Module) -> PipelineRun:
    """Returns what is known of the call of a pipeline that is calling a model in this thread."""
    pipe = running_pipeline(model)
    frame = None if pipe is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            given = frame.f_locals
            guided = given.get("do_classifier_free_guidance")
            if guided is None:
                guided = getattr(pipe, "do_classifier_free_guidance", None)
            prompts = _texts(given.get("prompt"))
            return PipelineRun(prompts, guided if isinstance(guided, bool) else None)
        frame = frame.f_back
    return PipelineRun()


def _texts(prompt: Any) -> tuple[str, ...] | None:
    if isinstance(prompt, str):
        return (prompt,)
    is_list = isinstance(prompt, list | tuple) and prompt
    return tuple(prompt) if is_list and all(isinstance(x, str) for x in prompt) else None
