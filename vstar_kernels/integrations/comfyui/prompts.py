"""The nodes of prompts over time: Synopsis and Write Synopsis."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from vstar_kernels.integrations.comfyui.common import CATEGORY
from vstar_kernels.methods.llm.endpoint import (
    KEY_VARIABLE,
    MODEL_VARIABLE,
    NO_KEY,
    OPENAI_URL,
    URL_VARIABLE,
)
from vstar_kernels.methods.vstar.embeddings import MODES, interpolate_embeddings
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.methods.vstar.writer import MOST_STAGES, SynopsisWriter
from vstar_kernels.reading import shorten

MOST_TOKENS = 60 * 77  # of a frame: CLIP's texts of any lengths up to six times its own
_ANCHORED = re.compile(r"(?P<frame>[0-9]{1,9})\s*:\s*(?P<text>.+)")


class MakeSynopsis(io.ComfyNode):
    """A text for each frame, of a video that is told in stages."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARSynopsis",
            display_name="VSTAR Synopsis",
            category=CATEGORY,
            description=(
                "A prompt for each frame: the stages of a video, one a line, are encoded, and "
                "frames between them get what lies between their encodings. As positive "
                "conditioning of AnimateDiff, with VSTAR Apply TAR on the model, the video follows "
                "prompts that change within 16 to 32 frames."
            ),
            search_aliases=[
                "prompt schedule",
                "prompt travel",
                "frame prompts",
                "BatchPromptSchedule",
            ],
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="The video as a whole; it is the only stage where there are no others.",
                ),
                io.String.Input(
                    "stages",
                    multiline=True,
                    default="",
                    tooltip=(
                        "What is seen at each stage, one a line, from the first frame to the last. "
                        "12: before each of them says in which frame it is seen purely, from 0."
                    ),
                ),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="Of the video: as many as the latent's batch size.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="linear",
                    tooltip=(
                        "What frames between two stages get: linear or slerp, a mixture; hold, the "
                        "stage before."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output("CONDITIONING", display_name="conditioning"),
                io.String.Output("STRING", display_name="synopsis"),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, prompt: str, stages: str, frames: int, mode: Any) -> Any:
        """Returns the conditioning, with a row for each frame, and the synopsis as JSON."""
        synopsis = read_stages(prompt, stages)
        encoded = [encode(clip, stage, "VSTAR Synopsis") for stage in synopsis.stages]
        lengths = [text.shape[1] for text, _ in encoded]
        length = math.lcm(*lengths)
        if length > MOST_TOKENS:
            have = ", ".join(map(str, sorted(set(lengths))))
            raise ValueError(
                f"the stages have {have} tokens: repeated until all are equally long they would "
                f"have {length}, more than {MOST_TOKENS}; make the longest stages shorter"
            )
        # Repeating all tokens of a text equally leaves attention to it as it is.
        texts = torch.cat([text.repeat(1, length // text.shape[1], 1) for text, _ in encoded])
        found = interpolate_embeddings(texts, frames, synopsis.anchors, mode)
        more = dict(encoded[0][1])
        pooled: list[Any] = [options.get("pooled_output") for _, options in encoded]
        if all(isinstance(x, Tensor) for x in pooled):
            rows = torch.cat(pooled)[:, None]
            between = interpolate_embeddings(rows, frames, synopsis.anchors, mode)
            more["pooled_output"] = between[:, 0]
        return io.NodeOutput([[found, more]], synopsis.to_json())


def read_stages(prompt: str, stages: str) -> Synopsis:
    """Returns the synopsis of a text of one stage a line, each with ``12: `` before it or none.

    Raises:
        ValueError: Some lines have a frame and some have not, or the synopsis is none.
    """
    lines = [line.strip() for line in stages.splitlines() if line.strip()]
    found = [_ANCHORED.fullmatch(line) for line in lines]
    prompt = prompt.strip()
    if not lines:
        return Synopsis(prompt, [prompt])
    if not any(found):
        return Synopsis(prompt or lines[0], lines)
    for line, match in zip(lines, found, strict=True):
        if match is None:
            raise ValueError(
                "either every stage says its frame, as in '12: a rose', or none does; "
                f"{shorten(line)!r} does not"
            )
    texts = [match["text"] for match in found if match]
    return Synopsis(prompt or texts[0], texts, [int(match["frame"]) for match in found if match])


def encode(clip: Any, text: str, node: str) -> tuple[Tensor, dict[str, Any]]:
    """Returns a text's encoding ``(1, tokens, channels)``, and what else ComfyUI keeps with it.

    Raises:
        ValueError: It has several, of which the node of this name cannot make use.
    """
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(encoded) != 1:
        raise ValueError(
            f"this CLIP encodes a text in {len(encoded)} parts, as its hooks are scheduled, and "
            f"{node} needs one: schedule the hooks of the model alone"
        )
    return encoded[0][0], encoded[0][1]


class WriteSynopsis(io.ComfyNode):
    """A language model that tells a video in stages."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARWriteSynopsis",
            display_name="VSTAR Write Synopsis",
            category=CATEGORY,
            description=(
                "Asks a language model to tell a video in stages, for VSTAR Synopsis. It is any "
                "server of OpenAI's interface, such as Ollama, llama.cpp or vLLM on this machine. "
                f"A key is taken from ${KEY_VARIABLE} of ComfyUI's process, never from the graph. "
                "Answers are kept: the same question is asked once."
            ),
            inputs=[
                io.String.Input("prompt", multiline=True, tooltip="The video as a whole."),
                io.Int.Input("stages", default=4, min=2, max=MOST_STAGES),
                io.String.Input(
                    "server",
                    display_name="server URL",
                    default="http://localhost:11434/v1",
                    tooltip=(
                        f"Empty: ${URL_VARIABLE}, or else OpenAI's. The key goes to that one "
                        "alone, never to another that a graph names."
                    ),
                ),
                io.String.Input(
                    "model",
                    default="",
                    tooltip=f"Its name there, such as llama3.1. Empty: ${MODEL_VARIABLE}.",
                ),
            ],
            outputs=[io.String.Output("STRING", display_name="stages")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """Returns what an answer depends on besides: asked again only where that has changed."""
        return [os.environ.get(name, "") for name in (URL_VARIABLE, MODEL_VARIABLE)]

    @classmethod
    def execute(cls, prompt: str, stages: int, server: str, model: str) -> Any:
        """Returns the stages, one a line, none of which says a frame."""
        writer = SynopsisWriter.from_endpoint(
            model.strip() or None, base_url=server.strip() or None, api_key=_key_for(server)
        )
        synopsis = writer.write(prompt.strip(), num_stages=stages)
        lines = [" ".join(stage.split()) for stage in synopsis.stages]
        # "1: A bud." numbers the stage, where VSTAR Synopsis would read a frame.
        lines = [f"Stage {line}" if _ANCHORED.fullmatch(line) else line for line in lines]
        return io.NodeOutput("\n".join(lines))


def _key_for(server: str) -> str | None:
    """Returns the key for a server that a graph names: none, unless the environment names it too.

    A graph comes from anyone, and may name any server.
    """
    own = os.environ.get(URL_VARIABLE, "") or OPENAI_URL
    is_own = server.strip().rstrip("/") in ("", own.strip().rstrip("/"))
    return None if is_own else NO_KEY
