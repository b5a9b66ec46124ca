"""Keeps secrets out of texts and logs, however a server repeats them."""

from __future__ import annotations

import base64
import html
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vstar_kernels.reading import clean

SHORTEST_SECRET = 8  # characters; shorter are placeholders, such as EMPTY, and may be words
SHORTEST_DISGUISED = 12  # letters and digits; shorter may be words of a sentence, as "not-needed"
HIDDEN = "[key]"
ROUNDS = 4  # of escapes in escapes
CLIENT_LOGGERS = ("openai", "httpx2", "httpcore2")

# No repetition can begin at two places of one run of characters: all of these are read in linear
# time. Escapes of JSON and JavaScript, of addresses, of HTML, and of quoted-printable text.
_ESCAPE = re.compile(
    r"(?<!\\)\\+(?:u(?P<u>[0-9a-f]{4})|u\{(?P<b>[0-9a-f]{1,6})\}|x(?P<x>[0-9a-f]{2})|(?P<o>[0-3][0-7]{2}))"
    r"|%u(?P<pu>[0-9a-f]{4})|%(?P<p>[0-9a-f]{2})"
    r"|&(?:\#[0-9]{1,7}|\#x[0-9a-f]{1,6}|[a-z][a-z0-9]{0,31});?"
    r"|=(?P<q>[0-9a-f]{2})",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"<[^<>]*>|(?<!\\)\\+(?:[bfnrt]|u00[01][0-9a-f])|=\r?\n", re.IGNORECASE)
_NO_LETTERS = re.compile(r"[\W_]+")


def redact(text: str, secrets: Iterable[str]) -> str:
    """Returns a text in which each of the secrets is "[key]".

    A text that has one in disguise is "[key]" as a whole: what of it is the secret is not to be
    told apart by a pattern in linear time. Disguises are escapes (of JSON, addresses, HTML), markup
    or punctuation between the characters, other cases and widths, base64, hexadecimal digits and
    the reverse. Whoever has a secret can write it in ways that nothing recognises.
    """
    secrets = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    unescaped = _unescape(text)
    if unescaped != text and any(secret in unescaped for secret in secrets):
        return HIDDEN
    disguises = [disguise for secret in secrets for disguise in _disguises(secret)]
    if disguises:
        shown = clean(unescaped)
        readings = {unescaped, shown, _MARKUP.sub("", shown), _MARKUP.sub("", text)}
        for letters in map(_letters, readings):
            if any(disguise in letters for disguise in disguises):
                return HIDDEN
    return text


def _disguises(secret: str) -> Iterator[str]:
    """Yields what the letters and digits of a text have among them if it holds a secret."""
    letters = _letters(secret)
    if len(letters) < SHORTEST_DISGUISED:
        return
    yield letters
    yield letters[::-1]
    content = secret.encode()
    yield content.hex()
    for before in range(3):  # characters of base64 that depend on the secret alone
        encoded = base64.b64encode(b"\0" * before + content).decode()
        yield _letters(encoded[-(-before * 4 // 3) : (before + len(content)) // 3 * 4])


def _letters(text: str) -> str:
    """Returns the letters and digits of a text, in one case and width."""
    if not text.isascii():
        text = text.translate(_Widths())
    return _NO_LETTERS.sub("", text).lower()


class _Widths(dict[int, str]):
    """Maps characters to their plain forms, one by one: whole texts may take quadratic time."""

    def __missing__(self, code: int) -> str:
        self[code] = unicodedata.normalize("NFKC", chr(code))
        return self[code]


def _unescape(text: str) -> str:
    for _ in range(ROUNDS):
        before, text = text, _ESCAPE.sub(_unescape_one, text)
        if text == before:
            break
    return text


def _unescape_one(found: re.Match[str]) -> str:
    if found["o"]:
        return chr(int(found["o"], 8))
    digits = found["u"] or found["b"] or found["x"] or found["pu"] or found["p"] or found["q"]
    if not digits:
        return html.unescape(found[0])
    code = int(digits, 16)
    return chr(code) if code < 0x110000 else found[0]


_redact_log: ContextVar[Callable[[str], str] | None] = ContextVar("redact_log", default=None)


@contextmanager
def redacted_logs(redact: Callable[[str], str]) -> Iterator[None]:
    """Redacts what the HTTP client's libraries log in this context: they log headers, too."""
    for name in [*logging.root.manager.loggerDict]:
        if name.split(".")[0] in CLIENT_LOGGERS:
            logging.getLogger(name).addFilter(_redact_record)  # once, however often it is added
    token = _redact_log.set(redact)
    try:
        yield
    finally:
        _redact_log.reset(token)


def _redact_record(record: logging.LogRecord) -> bool:
    if redact := _redact_log.get():
        record.msg, record.args = redact(clean(record.getMessage())), ()
        record.exc_info = record.exc_text = record.stack_info = None
    return True
