"""Which tokens of a prompt a word is: the key columns of its cross-attention map."""

from __future__ import annotations

from typing import Any, NamedTuple

from vstar_kernels.methods.arguments import check_integer, check_text

WORD_END = "</w>"  # of CLIP's byte pairs: it ends the last piece of a word
WORD_STARTS = ("▁", "Ġ")  # of sentencepiece (T5) and of GPT-2's byte pairs: it begins the first one


class Word(NamedTuple):
    """A word or a punctuation mark of a tokenized text.

    Attributes:
        text: In lower case, without the tokenizer's marks of its ends.
        tokens: The indices of its pieces among all tokens of the text, the first one (CLIP's BOS)
            counted.
    """

    text: str
    tokens: list[int]


def find_tokens(tokenizer: Any, prompt: str, word: str, occurrence: int = 0) -> list[int]:
    """Returns the indices of the tokens that a word, or several in a row, has in a prompt.

    >>> find_tokens(pipe.tokenizer, "two cats chase a fire truck", "cat")
    [2]
    >>> find_tokens(pipe.tokenizer, "two cats chase a fire truck", "fire truck")
    [5, 6]

    Where the prompt does not have the word itself, its plural or singular is taken.

    Args:
        tokenizer: The pipeline's, of transformers: CLIP's, or one with sentencepiece's marks (T5).
        prompt: The prompt, as the text encoder is given it.
        word: Part of the prompt, of whole words; letter case does not matter.
        occurrence: Which one, where it is there several times; 0 is the first.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The prompt has no such word or not so many, or the text encoder does not take
            as many tokens as there are up to it.
    """
    check_text("prompt", prompt)
    check_text("word", word)
    check_integer("occurrence", occurrence, 0)
    found = occurrences(tokenizer, prompt, word)
    if not found:
        raise ValueError(f"word: {word!r} is not in the prompt {prompt!r}")
    if occurrence >= len(found):
        raise ValueError(
            f"occurrence: {word!r} is {len(found)} times in the prompt, got {occurrence} "
            "(0 is the first)"
        )
    tokens = found[occurrence]
    # The last token that the encoder takes ends the text.
    if tokens[-1] >= tokenizer.model_max_length - 1:
        raise ValueError(
            f"word: {word!r} is at token {tokens[-1]} of the prompt, and the text encoder takes "
            f"{tokenizer.model_max_length}, the last of which ends the text: shorten the prompt"
        )
    return tokens


def occurrences(tokenizer: Any, prompt: str, word: str) -> list[list[int]]:
    """Returns the tokens of each occurrence of a word, or else of its plural or singular."""
    words = split_words(tokenizer, prompt)
    wanted = [part.text for part in split_words(tokenizer, word)]
    starts = range(len(words) - len(wanted) + 1) if wanted else range(0)
    slices = [words[start : start + len(wanted)] for start in starts]
    slices = [part for part in slices if [x.text for x in part[:-1]] == wanted[:-1]]
    exact = [part for part in slices if part[-1].text == wanted[-1]]
    chosen = exact or [part for part in slices if _same_but_for_number(part[-1].text, wanted[-1])]
    return [[token for x in part for token in x.tokens] for part in chosen]


def split_words(tokenizer: Any, text: str) -> list[Word]:
    """Returns the words of a text, each with the tokens that it is cut into."""
    ids = tokenizer(text, verbose=False).input_ids
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    words: list[Word] = []
    open_word = False  # whether the next piece goes on with the last word
    for index, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        if token in special:
            open_word = False
            continue
        begins, ends = piece.startswith(WORD_STARTS), piece.endswith(WORD_END)
        part = piece.removesuffix(WORD_END)
        part = (part[1:] if begins else part).lower()
        is_mark = not any(letter.isalnum() for letter in part)
        if begins or is_mark or not open_word:
            words.append(Word("", []))
        # A mark of a word's beginning can be a token by itself, which is of no word more than of
        # others.
        if part:
            words[-1].tokens.append(index)
            words[-1] = Word(words[-1].text + part, words[-1].tokens)
        open_word = not ends and (begins or not is_mark)
    return [word for word in words if word.text]


def _same_but_for_number(one: str, other: str) -> bool:
    """Returns whether either is the regular plural of the other (or a verb with its s)."""
    return other in _plurals(one) or one in _plurals(other)


def _plurals(word: str) -> set[str]:
    return {f"{word}s", f"{word}es"} | ({f"{word[:-1]}ies"} if word.endswith("y") else set())
