"""Reads the stages out of what a language model answered.

Models number, bullet, quote, wrap in JSON, put into code fences, announce and comment. What is
read here is what can be told apart without guessing; the rest raises, and is asked for again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from textwrap import dedent
from typing import Any

# Reasoning that some models put before their answer; the opening tag may be the template's.
_THINKING = re.compile(r"\A.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_UNFINISHED = re.compile(r"<think|[\[{](?!.*[\]}])", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_JSON_VALUE = re.compile(r"[\[{].*[\]}]", re.DOTALL)
_LIST_KEYS = ("stages", "subprompts", "sub_prompts", "synopsis", "descriptions", "prompts")
_TEXT_KEYS = ("description", "text", "prompt", "content", "caption", "sentence")

# A number, alone or after a word, as "2.", "2 -", "**Stage 2 (Spring):**" and "### Frames 5-8".
_MARKUP = r"(?:[-*•]\s+)?#*\s*[*_(\[]*"
_WORD = r"(?:stage|step|scene|frame|phase|part|shot|prompt)s?\s*#?\s*"
_NUMBER = r"(?P<number>\d{1,3})(?P<range>\s*[-–—]\s*\d{1,3})?"
_TEXT = r"(?!\d)[\s*_]*(?P<text>.*)"  # no digit: neither 3:15 nor 10.5 is a number in a list
_NUMBERED = (
    re.compile(
        rf"{_MARKUP}{_WORD}{_NUMBER}\s*(?:\([^)]*\))?[\s*_\])]*(?:[:.\-–—]|$){_TEXT}", re.IGNORECASE
    ),
    re.compile(rf"{_MARKUP}{_NUMBER}(?:[\s*_]*[:.)\]]|\s+[-–—]){_TEXT}"),
)
_BULLETED = re.compile(r"[-*•‣–—▪]\s+(?P<text>.*)")
_PREAMBLE = re.compile(r"(?:sure|certainly|of course|okay|ok|here (?:are|is|'s)|here’s)\b.*", re.I)
_REMARK = re.compile(
    r"(?:let me know|i hope|hope this|i(?:'|’)d be happy|would you like|feel free|please note|note:"
    r"|these (?:stages|descriptions|prompts)|each (?:stage|description|prompt)|this synopsis)\b.*",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:(?:i(?:'|’)m |i am )?sorry|i (?:can(?:no|'|’)t|will not|won(?:'|’)t)|as an ai)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)*_]*$")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "`": "`"}


def parse_stages(answer: str) -> list[str]:
    """The stage descriptions of an answer, in their order, without numbers, quotes and markup.

    Raises:
        ValueError: There are none, or it is not clear which they are.
    """
    answer = dedent(_THINKING.sub("", answer)).strip()
    if not answer:
        raise ValueError("the answer is empty")
    if _UNFINISHED.match(answer):
        raise ValueError("the answer is cut off")
    stages = _from_json(answer)
    if stages is None:
        stages = _from_lines(answer)
    if not stages:
        raise ValueError("the answer has no stages")
    stages = [_clean(stage) for stage in stages]
    for number, stage in enumerate(stages, start=1):
        if not any(map(str.isalpha, stage)):
            raise ValueError(f"stage {number} has no text")
    return stages


def _from_json(answer: str) -> list[str] | None:
    """The stages of the JSON in an answer; None where there is no JSON."""
    candidates = [answer, *_FENCE.findall(answer), *_JSON_VALUE.findall(answer)]
    for candidate in candidates:
        try:
            value = json.loads(candidate)
        except ValueError:
            continue
        # In a sentence, [5] is no list of stages.
        if isinstance(value, list | dict) and (candidate is answer or _has_texts(value)):
            return _texts(value)
    return None


def _has_texts(value: list[Any] | dict[str, Any]) -> bool:
    return any(isinstance(item, str | list | dict) for item in value)


def _texts(value: Any) -> list[str]:
    """The texts of a JSON list or object."""
    if isinstance(value, dict):
        lists = [value[key] for key in _LIST_KEYS if isinstance(value.get(key), list | dict)]
        if lists:
            return _texts(lists[0])
        if not all(re.search(r"\d", key) for key in value):  # {"stage 1": …, "stage 2": …}
            raise ValueError("the JSON object has no list of stages")
        return [_text(item) for item in value.values()]
    return [_text(item) for item in value]


def _text(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        texts = [item[key] for key in _TEXT_KEYS if isinstance(item.get(key), str)][:1]
        texts = texts or [text for text in item.values() if isinstance(text, str)]
        if len(texts) == 1:
            return texts[0]
    raise ValueError(f"the JSON list has an element that is no description: {item!r:.60}")


@dataclass
class _Item:
    """A line that begins a stage, and what goes on from it."""

    number: int | None
    is_range: bool
    indent: int
    text: str


def _from_lines(answer: str) -> list[str]:
    fenced = _FENCE.findall(answer)
    lines = (fenced[0] if len(fenced) == 1 else answer).splitlines()
    items = list(_items(lines, _numbered)) or list(_items(lines, _bulleted))
    if not items:
        return _plain(lines)
    numbers = [item.number for item in items if item.number is not None]
    consecutive = all(b - a == 1 for a, b in pairwise(numbers))
    if not consecutive and not any(item.is_range for item in items):
        raise ValueError(f"the stages are numbered {', '.join(map(str, numbers))}")
    return [item.text for item in items]


def _items(lines: list[str], match: Any) -> Iterator[_Item]:
    """The list's items, each with the lines that continue it."""
    item: _Item | None = None
    after_blank = False
    for line in lines:
        text = line.strip()
        found = match(line)
        if found and (item is None or found.indent <= item.indent + 1):
            if item is not None:
                yield item
            item = found
        elif item is not None and text and _continues(item, line, after_blank):
            inner = found or _bulleted(line)
            item.text = f"{item.text} {inner.text if inner else text}".strip()
        after_blank = not text
    if item is not None:
        yield item


def _continues(item: _Item, line: str, after_blank: bool) -> bool:
    """Whether a line without a mark of its own belongs to the item before it.

    A remark after the list starts after a blank line, or after the end of the last sentence.
    """
    if not item.text:  # a heading: "Stage 1"
        return True
    if _REMARK.match(line.strip()):
        return False
    return _indent(line) > item.indent or not (after_blank or _SENTENCE_END.search(item.text))


def _numbered(line: str) -> _Item | None:
    match = next(filter(None, (form.fullmatch(line.strip()) for form in _NUMBERED)), None)
    if match is None:
        return None
    number, is_range = int(match["number"]), match["range"] is not None
    return _Item(number, is_range, _indent(line), match["text"])


def _bulleted(line: str) -> _Item | None:
    match = _BULLETED.fullmatch(line.strip())
    if match is None:
        return None
    return _Item(None, False, _indent(line), match["text"])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _plain(lines: list[str]) -> list[str]:
    """Lines without any marks, but for what announces them and what is remarked on them."""
    texts = [text for line in lines if (text := line.strip()) and not text.startswith("```")]
    if any(text.startswith("|") for text in texts):
        raise ValueError("the stages are in a table")
    if _REFUSAL.match(texts[0]):
        raise ValueError("the answer is a refusal")
    if len(texts) > 1 and (texts[0].endswith(":") or _PREAMBLE.match(texts[0])):
        texts = texts[1:]
    while len(texts) > 1 and _REMARK.match(texts[-1]):
        texts = texts[:-1]
    return texts


def _clean(text: str) -> str:
    """A description without markup and quotes around it, on one line."""
    text = " ".join(text.replace("**", "").replace("__", "").split()).strip(" *_")
    while len(text) > 1 and _QUOTES.get(text[0]) == text.rstrip(",;")[-1:]:
        text = text.rstrip(",;")[1:-1].strip()
    return text
