"""Layouts as they are read from the arguments of a model's call.

A ``Family`` (``families.py``) names one of these functions. What it returns is held against the
tokens that the layers are called with; what does not fit raises. Coordinates are in latent frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.attention.frames.layout import Frames, Layout, Text
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.models.full3d.seats import Reading
from vstar_kernels.models.hooks import Argument


class Call:
    """The arguments of one call of a model.

    Args:
        model: The model.
        args, kwargs: As its forward is called with them.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model: Any = model
        self._args, self._kwargs = args, kwargs

    def __getitem__(self, name: str) -> Any:
        """Returns an argument by its name, None where the call leaves it out."""
        return Argument(self.model, name).get(self._args, self._kwargs)

    @property
    def sample(self) -> Tensor:
        """The latents; of Cosmos 3, which takes several videos, those of the last.

        That is the one it makes: the others control it, and are left out on one side of guidance.
        """
        found = self["hidden_states"]
        found = self["vision_tokens"] if found is None else found
        last: Tensor = found[-1] if isinstance(found, list | tuple) else found
        return last

    @property
    def timestep(self) -> Any:
        """How noisy the latents are, in the model's measure: all of them, or each token.

        Cosmos 3 is told it of what it denoises alone, which may be sound or actions to a video.
        """
        found = self["timestep"]
        if found is not None:
            return found
        told = (self[f"{kind}_timesteps"] for kind in ("vision", "sound", "action"))
        return next((x for x in told if x is not None and x.numel()), None)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def frames(self, axes: tuple[int, int, int] = (-3, -2, -1)) -> Frames:
        """Returns the frames of latents, by default ``(…, frames, height, width)``, in patches.

        All three numbers round down, as a convolution without padding has it.
        """
        sizes = [self.sample.shape[axis] for axis in axes]
        frames, height, width = (n // p for n, p in zip(sizes, self.patch(), strict=True))
        return Frames(frames, height * width)

    def patch(self) -> tuple[int, int, int]:
        """Returns the patch ``(frames, height, width)``."""
        size = self.config.patch_size
        if isinstance(size, int):
            return getattr(self.config, "patch_size_t", None) or 1, size, size
        frames, height, width = size
        return frames, height, width

    def tokens(self, *names: str) -> int:
        """Returns how many tokens arguments ``(batch, tokens, channels)`` have together."""
        return sum(0 if self[name] is None else self[name].shape[1] for name in names)

    def read(self, *segments: Frames | Text, **more: Any) -> Reading:
        """Returns a reading of segments, in the order of the sequence."""
        source = f"latents of shape {tuple(self.sample.shape)} in patches of {self.patch()}"
        if any(isinstance(segment, Text) for segment in segments):
            source += ", and the text,"
        return Reading(Layout(*segments), source, **more)


def video(call: Call) -> Reading:
    """Reads latents ``(batch, channels, frames, height, width)`` without text among them."""
    return call.read(call.frames())


def chronoedit(call: Call) -> Reading:
    """Reads an edit of an image: of two frames, the second is at the end of a time left out."""
    frames = call.frames()
    if call.sample.shape[2] != 2:
        return call.read(frames)
    apart = call.config.rope_temporal_skip_len - 1
    return call.read(Frames(frames.count, frames.tokens, step=max(apart, 1)))


def skyreels(call: Call) -> Reading:
    """Reads a video whose frames see those of their block and of the blocks before it."""
    block = call.config.num_frame_per_block
    if block <= 1:
        return call.read(call.frames())
    without = type(call.config)({**call.config, "num_frame_per_block": 1})
    return call.read(call.frames(), rule=FrameRule.causal(block), masked=True, config=without)


def anyflow(call: Call) -> Reading:
    """Reads latents ``(batch, frames, channels, height, width)`` without text among them."""
    return call.read(call.frames((1, 3, 4)))


def cogvideox(call: Call) -> Reading:
    """Reads a prompt, and latents ``(batch, frames, channels, height, width)`` after it."""
    _, frames, _, height, width = call.sample.shape
    of_frames, of_height, of_width = call.patch()
    tokens = (height // of_height) * (width // of_width)
    return call.read(
        Text(call.tokens("encoder_hidden_states")), Frames(-(-frames // of_frames), tokens)
    )


def easyanimate(call: Call) -> Reading:
    """Reads two prompts, and the video after them."""
    text = call.tokens("encoder_hidden_states", "encoder_hidden_states_t5")
    return call.read(Text(text), call.frames())


def mochi(call: Call) -> Reading:
    """Reads a video and a prompt after it, whose length the layers are told."""
    return call.read(call.frames(), Text(call.tokens("encoder_hidden_states")))


def hunyuan15(call: Call) -> Reading:
    """Reads a video, and an image and two prompts after it, whose length the layers are told."""
    text = call.tokens("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return call.read(call.frames(), Text(text))


def hunyuan(call: Call) -> Reading:
    """Reads a video and a prompt after it; which of the prompt's tokens exist, a mask says."""
    frames, text = call.frames(), call.tokens("encoder_hidden_states")
    lengths = frames.count * frames.tokens + _valid(call)
    return call.read(frames, Text(text), key_lengths=lengths, masked=True)


def motif(call: Call) -> Reading:
    """Reads a video and a prompt after it; the last layers attend to the video twice, instead.

    They are a decoder, which sees what the layers before it have made of the video.
    """
    frames = call.frames()
    text = call.tokens("image_embeds", "encoder_hidden_states")
    decoder = len(call.model.single_transformer_blocks) - call.config.num_decoder_layers
    twice = call.read(frames, frames)
    own = {
        f"single_transformer_blocks.{i}.attn": twice
        for i in range(decoder, len(call.model.single_transformer_blocks))
    }
    if call["encoder_attention_mask"] is None:
        return call.read(frames, Text(text), layers=own)
    lengths = frames.count * frames.tokens + call.tokens("image_embeds") + _valid(call)
    return call.read(frames, Text(text), key_lengths=lengths, masked=True, layers=own)


def framepack(call: Call) -> Reading:
    """Reads history, the oldest in the largest patches, the new frames, an image and a prompt."""
    segments = [
        *_history(call, "latents_history_4x", "indices_latents_history_4x", 4),
        *_history(call, "latents_history_2x", "indices_latents_history_2x", 2),
        *_history(call, "latents_clean", "indices_latents_clean", 1),
        *_placed(call.frames(), _times(call["indices_latents"])),
    ]
    video = sum(x.count * x.tokens for x in segments)
    image, text = call.tokens("image_embeds"), call.tokens("encoder_hidden_states")
    valid = _valid(call)
    if len(valid) == 1:  # the model cuts the prompt off where its tokens end
        return call.read(*segments, Text(image + int(valid)))
    lengths = video + image + valid
    return call.read(*segments, Text(image + text), key_lengths=lengths, masked=True)


def helios(call: Call) -> Reading:
    """Reads history, the oldest in the largest patches, and the new frames."""
    return call.read(
        *_history(call, "latents_history_long", "indices_latents_history_long", 4),
        *_history(call, "latents_history_mid", "indices_latents_history_mid", 2),
        *_history(call, "latents_history_short", "indices_latents_history_short", 1),
        *_placed(call.frames(), _times(call["indices_hidden_states"])),
    )


def kandinsky(call: Call) -> Reading:
    """Reads latents ``(batch, frames, height, width, channels)``."""
    return call.read(call.frames((1, 2, 3)))


def kandinsky6(call: Call) -> Reading:
    """Reads what :func:`kandinsky` does; a reference frame may follow the video's, at time 0."""
    positions = call["visual_rope_pos"]
    times = None if positions is None else _times(positions[0])
    return call.read(*_placed(call.frames((1, 2, 3)), times))


def ltx(call: Call) -> Reading:
    """Reads a sequence of frames whose number and size are told, or whose coordinates are.

    Coordinates are those of pixels, in seconds. The first latent frame is of one pixel frame, each
    other one is of eight. Frames of a condition, before or after the video's, have theirs.
    """
    coordinates = call["video_coords"]
    if coordinates is None:
        frames, height, width = (call[name] for name in ("num_frames", "height", "width"))
        source = f"num_frames={frames}, height={height} and width={width}"
        return Reading(Layout(Frames(frames, height * width)), source)
    times = coordinates[0, 0].double()
    if times.ndim == 2:  # LTX-2 gives where each patch begins and ends
        times = times[:, 0]
    source = f"video_coords of shape {tuple(coordinates.shape)}"
    return Reading(Layout.from_coordinates(_in_latent_frames(times.cpu())), source)


def minimax_h3(call: Call) -> Reading:
    """Reads a packed sequence of video, text and audio, of which the coordinates are told."""
    times, tags = call["position_ids"][:, 0], call["token_tags"]
    source = f"position_ids and token_tags of {len(tags)} tokens"
    return Reading(Layout.from_coordinates(times, text=tags != 0), source)


def cosmos3(call: Call) -> Reading:
    """Reads videos, sound and actions, packed, which attend to themselves and a prompt before them.

    The prompt does not attend to them. Videos are of the same time: each that controls another has
    its frames where the other's are.
    """
    before = int(call["und_len"])
    shapes = call["vision_token_shapes"]
    source = f"vision_token_shapes {shapes}, und_len={before} and the sequence's length"
    places = call["vision_sequence_indexes"].cpu() - before
    times = torch.zeros(int(call["sequence_length"]) - before, dtype=torch.float64, device="cpu")
    is_text = torch.ones(times.shape, dtype=torch.bool, device="cpu")
    numbers = [
        torch.arange(frames, dtype=times.dtype, device="cpu").repeat_interleave(height * width)
        for frames, height, width in shapes
    ]
    times[places] = torch.cat(numbers)
    is_text[places] = False
    layout = Layout.from_coordinates(times, text=is_text)
    return Reading(layout, source, key_layout=Layout(Text(before), *layout.segments))


def no_layout(call: Call) -> Reading:
    """Raises ValueError: nothing is known of the model's arguments."""
    raise ValueError(
        f"nothing is known of what a {type(call.model).__name__} is called with: give the layout="
    )


def _valid(call: Call) -> Tensor:
    """Returns how many tokens of each prompt exist, ``(batch,)`` int32."""
    mask: Tensor = call["encoder_attention_mask"]
    return mask.sum(dim=1, dtype=torch.int32)


def _times(indices: Tensor | None) -> list[float] | None:
    """Returns the times of frames, which are the same in each sequence of a batch."""
    if indices is None:
        return None
    times: list[float] = (indices[0] if indices.ndim == 2 else indices).tolist()
    return times


def _history(call: Call, latents: str, indices: str, patch: int) -> list[Frames]:
    """Returns frames that are conditions, ``patch`` of them as one, in patches as much larger.

    Where they do not fill the last patch, they are repeated. The time of a patch is the mean.
    """
    if call[latents] is None or call[indices] is None:
        return []
    _, of_height, of_width = call.patch()
    *_, height, width = call[latents].shape
    size = height // of_height, width // of_width
    if patch > 1:  # they are padded to whole patches, the others are cut
        size = -(-height // (of_height * patch)), -(-width // (of_width * patch))
    times = _times(call[indices]) or []
    times = times + times[-1:] * (-len(times) % patch)
    means = [sum(times[i : i + patch]) / patch for i in range(0, len(times), patch)]
    return _placed(Frames(max(len(means), 1), size[0] * size[1]), means)


def _placed(frames: Frames, times: Sequence[float] | None) -> list[Frames]:
    """Returns frames at these times, which need not be equally far apart."""
    if times is None:
        return [frames]
    return [Frames(1, frames.tokens, first=time) for time in times]


def _in_latent_frames(seconds: Tensor) -> Tensor:
    """Returns times in latent frames, of which the first is one pixel frame and others are eight.

    What stands between the video's own frames, such as a condition's, keeps its place between them.
    The frame rate is not told: eight pixel frames are what most neighbours in the sequence are
    apart, of several such lengths the longest.
    """
    ratio = 8
    seconds = seconds.contiguous()
    distinct = seconds.unique()
    if len(distinct) < 3:
        return torch.searchsorted(distinct, seconds).double()
    steps = seconds.unique_consecutive().diff()
    lengths, counts = (steps[steps > 0] * 1e5).round().unique(return_counts=True)
    longest = lengths[counts == counts.max()].max()
    step = steps[(steps * 1e5).round() == longest].mean()
    times = torch.where(seconds == 0, 0.0, seconds / step + (ratio - 1) / ratio)
    return (times * 1024).round() / 1024  # what are whole numbers of frames, are in floats too
