"""The texts of the frames, and how they fit into a call of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = "(frames, tokens, channels) or (batch, frames, tokens, channels)"


@dataclass(frozen=True)
class Fit:
    """How the frame prompts fit into one call of the model."""

    rows: int  # batch · frames
    tokens: int  # of the text that is replaced
    guided: bool
    videos_per_prompt: int


@dataclass
class FramePrompts:
    """The arguments of :func:`condition_frames`, checked one by one."""

    embeddings: Tensor
    negative: Tensor | None
    guidance: bool | None
    _told_apart: Tensor | None = None  # the text by whose halves guidance was last recognised

    def fit(self, sample: torch.Size, text: Tensor) -> Fit:
        """How they fit into ``(batch, channels, frames, height, width)`` and the text replaced.

        Raises:
            ValueError: They do not.
        """
        prompts, frames, tokens, channels = batched(self.embeddings).shape
        batch = sample[0]
        for name, ours, theirs in (
            ("frames", frames, sample[2]),
            ("channels", channels, text.shape[-1]),
        ):
            if ours != theirs:
                raise ValueError(
                    f"embeddings have {ours} {name} (shape {tuple(self.embeddings.shape)}), "
                    f"the model was called with {theirs}"
                )
        guided = self._is_guided(batch, prompts, text)
        conditional = batch // 2 if guided else batch
        if conditional * (1 + guided) != batch or conditional % prompts:
            raise ValueError(
                f"embeddings for {prompts} prompts (shape {tuple(self.embeddings.shape)}) with "
                f"guidance={guided} need a batch that is a multiple of {prompts * (1 + guided)}, "
                f"the model was called with {batch}"
            )
        if guided and self.negative is None and tokens != text.shape[1]:
            raise ValueError(
                f"embeddings have {tokens} tokens, the text of the unconditional half, which the "
                f"pipeline passes, has {text.shape[1]}: they must be as many, or pass negative"
            )
        return Fit(batch * frames, text.shape[1], guided, conditional // prompts)

    def _is_guided(self, batch: int, prompts: int, text: Tensor) -> bool:
        if self.guidance is not None:
            return self.guidance
        if batch not in (prompts, 2 * prompts):
            raise ValueError(
                f"cannot tell whether a batch of {batch} with embeddings for {prompts} prompts is "
                "under classifier-free guidance: pass guidance=True or guidance=False"
            )
        if batch == prompts:
            return False
        # Two videos for each prompt, unguided, have the same text in both halves.
        if text is not self._told_apart:
            unconditional, conditional = text.chunk(2)
            if unconditional.equal(conditional):
                raise ValueError(
                    f"cannot tell whether a batch of {batch} with embeddings for {prompts} "
                    "prompts is under classifier-free guidance, as both halves of "
                    "encoder_hidden_states are the same: pass guidance=True or guidance=False"
                )
            self._told_apart = text
        return True


def batched(embeddings: Tensor) -> Tensor:
    """``(batch, frames, tokens, channels)``."""
    return embeddings if embeddings.ndim == 4 else embeddings[None]


def check_embeddings(embeddings: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless they are embeddings of frames."""
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(embeddings).__name__}")
    if embeddings.ndim not in (3, 4) or not embeddings.numel():
        raise ValueError(f"{name} must be {SHAPES}, none of them 0, got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point type, got {embeddings.dtype}")
