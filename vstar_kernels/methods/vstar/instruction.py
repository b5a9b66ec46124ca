"""What a language model is told to write a synopsis (VSTAR, section 3.1): rules and one example."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = 1  # of this text: answers to another one are not reused

RULES = """\
You plan short videos in which something visibly changes. You get one sentence about the whole \
video. Split the change into consecutive stages of about equal length and describe each of them.

- One sentence of at most 25 words for each stage: what a still picture of that stage shows.
- Every sentence is read alone. Name the subject and the place each time; no "it", "then" or "now".
- Subject, place, viewpoint and style stay the same; only what the change affects differs, and \
each stage differs visibly from the one before.
- Begin with the state before the change and end with the state after it.

Answer with a numbered list, one stage a line, and nothing else."""

EXAMPLE_PROMPT = "A candle burns down on a windowsill at night, time lapse."
EXAMPLE_STAGES = (
    "A tall new candle with a small first flame on a dark windowsill at night.",
    "A tall candle with a bright steady flame on a dark windowsill at night, wax beginning to run.",
    "A half-burnt candle with a bright flame on a dark windowsill at night, wax pooled below it.",
    "A short candle stub with a low flame on a dark windowsill at night, in a wide pool of wax.",
    "A burnt-out candle, a thread of smoke over flat wax on a dark windowsill at night.",
)


@dataclass(frozen=True)
class Request:
    """What is asked of a language model.

    Attributes:
        prompt: The video as a whole.
        least, most: How many stages to describe.
    """

    prompt: str
    least: int
    most: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as chat models take it."""
        example_count = len(EXAMPLE_STAGES)
        return [
            {"role": "system", "content": RULES},
            {"role": "user", "content": _question(EXAMPLE_PROMPT, example_count, example_count)},
            {"role": "assistant", "content": _numbered(EXAMPLE_STAGES)},
            {"role": "user", "content": _question(self.prompt, self.least, self.most)},
        ]

    def check(self, stages: list[str]) -> None:
        """Raise ValueError unless there are as many stages as were asked for."""
        if not self.least <= len(stages) <= self.most:
            raise ValueError(f"expected {self.wanted} stages, found {len(stages)}")

    @property
    def wanted(self) -> str:
        """The number of stages in words."""
        return _range(self.least, self.most)


def correction(answer: str, problem: str) -> list[dict[str, str]]:
    """The continuation after an answer that could not be used."""
    demand = (
        f"That cannot be used: {problem}. Answer with the numbered list alone, one stage a line."
    )
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": demand}]


def _question(prompt: str, least: int, most: int) -> str:
    return f"Video: {prompt}\nNumber of stages: {_range(least, most)}"


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _numbered(stages: tuple[str, ...]) -> str:
    return "\n".join(f"{number}. {stage}" for number, stage in enumerate(stages, start=1))
