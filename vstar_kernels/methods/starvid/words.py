"""The words of a plan in its prompt, and what is wanted of their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.methods.starvid.masks import box_mask
from vstar_kernels.methods.starvid.tokens import find_tokens, occurrences
from vstar_kernels.methods.starvid.trajectory import Trajectory


@dataclass(frozen=True)
class PlanWords:
    """The nouns and verbs of a plan, each word once, as columns of cross-attention maps.

    Attributes:
        texts: The words.
        tokens: The tokens of each in the prompt.
        nouns: Of each subject, the column of its noun; subjects with the same word share one.
        verbs: Of each subject, the column of its verb; None where it has none.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    nouns: tuple[int, ...]
    verbs: tuple[int | None, ...]

    @property
    def noun_columns(self) -> list[int]:
        """The columns that are nouns', each once."""
        return sorted(set(self.nouns))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The columns of each noun and its verb, each pair once."""
        found = zip(self.nouns, self.verbs, strict=True)
        return sorted({(noun, verb) for noun, verb in found if verb is not None})


def plan_words(tokenizer: Any, plan: Trajectory, texts: Sequence[str] | None = None) -> PlanWords:
    """Finds the words of a plan in its prompt.

    Where several subjects have the same word, each has an occurrence of its own if the prompt has
    as many, else they share the first.

    Args:
        tokenizer: The pipeline's.
        plan: The plan.
        texts: What the frames are conditioned on, where it is not the plan's prompt: the stages of
            a synopsis, say. Each word must have the same tokens in all of them.

    Raises:
        ValueError: A word is not in a text, beyond what the text encoder takes, at different tokens
            in several texts, or a subject's noun is its verb.
    """
    texts = [plan.prompt] if texts is None else list(texts)
    if not texts:
        raise ValueError("texts must hold what the frames are conditioned on, got none")
    found: dict[tuple[int, ...], str] = {}
    nouns = _columns(tokenizer, texts, [subject.noun for subject in plan.subjects], found)
    verbs = _columns(tokenizer, texts, [subject.verb for subject in plan.subjects], found)
    for subject, noun, verb in zip(plan.subjects, nouns, verbs, strict=True):
        if noun == verb:
            raise ValueError(f"plan: {subject.noun!r} is the noun and the verb of one subject")
    columns = list(found)
    return PlanWords(
        tuple(found.values()),
        tuple(columns),
        tuple(columns.index(noun) for noun in nouns if noun is not None),
        tuple(None if verb is None else columns.index(verb) for verb in verbs),
    )


def _columns(
    tokenizer: Any,
    texts: list[str],
    words: Sequence[str | None],
    found: dict[tuple[int, ...], str],
) -> list[tuple[int, ...] | None]:
    """Returns the tokens of each word, None of None, and adds them to those found."""
    columns: list[tuple[int, ...] | None] = []
    for index, word in enumerate(words):
        if word is None:
            columns.append(None)
            continue
        same = [other for other in words if other is not None and other.lower() == word.lower()]
        before = [x for x in words[:index] if x is not None and x.lower() == word.lower()]
        occurrence = len(before)
        if len(occurrences(tokenizer, texts[0], word)) < len(same):
            occurrence = 0
        tokens = {tuple(find_tokens(tokenizer, text, word, occurrence)) for text in texts}
        if len(tokens) > 1:
            raise ValueError(
                f"plan: {word!r} is at different tokens in the texts of the frames, "
                f"{' and '.join(str(list(x)) for x in sorted(tokens))}: begin them in the same way"
            )
        columns.append(next(iter(tokens)))
        found.setdefault(columns[-1] or (), word)
    return columns


@dataclass(frozen=True, eq=False)
class PlanTargets:
    """What is wanted of the maps of a plan's words, in a video of some frames and maps of a size.

    Attributes:
        words: The plan's words.
        masks: Of each noun column the cells of its boxes, bool ``(frames, nouns, height, width)``:
            none in frames without the subject, the union where subjects share the column.
        present: In which frames the subject of each of ``words.pairs`` is there, bool
            ``(pairs, frames)``.
    """

    words: PlanWords
    masks: Tensor
    present: Tensor


def plan_targets(
    plan: Trajectory, words: PlanWords, num_frames: int, height: int, width: int
) -> PlanTargets:
    """Returns what is wanted of the maps, by the plan's boxes in each frame."""
    boxes, present = plan.boxes(num_frames)
    everywhere = torch.tensor([0.0, 0.0, 1.0, 1.0])
    cells = box_mask(torch.where(present[..., None], boxes, everywhere), height, width)
    cells &= present[..., None, None]
    masks = [
        cells[[subject for subject, noun in enumerate(words.nouns) if noun == column]].any(0)
        for column in words.noun_columns
    ]
    subjects = list(zip(words.nouns, words.verbs, strict=True))
    there = [
        present[[index for index, found in enumerate(subjects) if found == pair]].any(0)
        for pair in words.pairs
    ]
    return PlanTargets(
        words,
        torch.stack(masks, dim=1),
        torch.stack(there) if there else torch.zeros(0, num_frames, dtype=torch.bool),
    )
