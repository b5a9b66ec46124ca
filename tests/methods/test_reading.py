"""Hostile documents: each is one kind of error, that names the field, and is read in no time."""

import json
import time

import pytest

import vstar_kernels as vk
from vstar_kernels.methods.reading import FormatError, clean, decode, shorten

DEEP = 200_000
GOOD = {"prompt": "A pond.", "stages": ["Water.", "Ice."]}


def synopsis(**fields):
    """A synopsis' JSON, with some fields replaced by JSON texts."""
    texts = {**{name: json.dumps(value) for name, value in GOOD.items()}, **fields}
    return "{" + ", ".join(f'"{name}": {text}' for name, text in texts.items()) + "}"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[" * DEEP, "nested too deeply"),
        ('{"prompt": ' * DEEP, "nested too deeply"),
        (synopsis(stages="[" * DEEP + "]" * DEEP), "nested too deeply"),
        (synopsis(prompt="9" * 400), r"prompt: Input should be a valid string, got int"),
        (
            synopsis(anchors=f"[0, {'9' * 400}]"),
            r"anchors\[1\]: .*less than or equal to 2147483647",
        ),
        (synopsis(anchors=f"[0, {'9' * 5000}]"), "a number of too many digits"),
        (synopsis(anchors="[0, 1e999]"), r"anchors\[1\]: .*valid integer, got float"),
        (synopsis(anchors="[0, -1]"), r"anchors\[1\]: .*greater than or equal to 0"),
        (synopsis(anchors="[0, NaN]"), "NaN is not a number"),
        (synopsis(anchors="[0, true]"), r"anchors\[1\]: .*valid integer, got bool"),
        (synopsis(anchors='"01"'), "anchors: .*valid list, got str"),
        (synopsis(prompt='"p", "prompt": "q"'), "the key 'prompt' twice"),
        (synopsis(prompt='"p", "pro\\u0000mpt": "q"'), "the key 'prompt' twice"),
        (synopsis(prompt='"\\u001b[31m"'), "prompt must not be empty"),
        (synopsis(stages='["Water.", null]'), r"stages\[1\]: .*valid string, got NoneType"),
        (synopsis(größe="3"), "größe: there is no such field"),
        ("\ud800", "it is not JSON"),
        ("", "it is not JSON"),
        ("null", "must be a JSON object, got NoneType"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_hostile_synopses(document, message):
    for read in (vk.Synopsis.from_json, vk.Synopsis.list_from_json):
        with pytest.raises(FormatError, match=message) as caught:
            read(document)
        assert isinstance(caught.value, ValueError)
        assert len(str(caught.value)) < 500
    with pytest.raises(FormatError, match=r"nested|not JSON|number|twice|\[0\]: "):
        vk.Synopsis.list_from_json(f"[{document or '?'}]")


def test_halves_of_surrogate_pairs():
    assert (
        vk.Synopsis.from_json(synopsis(prompt='"A \\ud83d\\ude00 pond\\ud800."')).prompt
        == "A 😀 pond."
    )
    for arguments in (("A pond\ud800.", ["Water."]), ("A pond.", ["Water\udfff."])):
        with pytest.raises(ValueError, match="no halves of characters"):
            vk.Synopsis(*arguments)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\x1b[31;1mred\x1b[0m", "ared"),
        ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\c", "abc"),
        ("a\x9b31mb\x9d0;title\x9cc", "abc"),
        ("\x1bPdevice\x1b\\a\x1bc", "a"),
        ("a\x00\x08\x7f\x85b\u202e\u2066\ufeff", "ab"),
        ("a\r\nb\rc\nd\te", "a\nb\nc\nd\te"),
        ("Ünï çode 漢字 👩‍🚀 می‌خواهم", "Ünï çode 漢字 👩‍🚀 می‌خواهم"),
    ],
)
def test_what_terminals_obey_is_left_out(text, cleaned):
    assert clean(text) == cleaned
    assert decode(json.dumps([{text: [text]}])) == [{cleaned: [cleaned]}]
    read = vk.Synopsis.from_json(json.dumps({"prompt": f"p {text}", "stages": [f"s {text}"]}))
    assert (read.prompt, read.stages) == (f"p {cleaned}", (f"s {cleaned}",))
    assert shorten(text) == " ".join(cleaned.split())


LARGE = 2**20
SAME = json.dumps({"prompt": "p" * (LARGE // 2), "stages": ["a"]})
FLOODS = {
    "brackets": "[" * LARGE,
    "braces": '{"a":' * (LARGE // 5),
    "pairs": "[]" * (LARGE // 2),
    "quotes": '"' * LARGE,
    "backslashes": "\\" * LARGE,
    "digits": "9" * LARGE,
    "decimals": "0." + "9" * LARGE,
    "spaces": " " * LARGE,
    "escapes": "\x1b[" * (LARGE // 2),
    "strings": "\x1b]" * (LARGE // 2),
    "one string": "\x1b]" + "x" * LARGE,
    "fences": "```" * (LARGE // 3),
    "tags": "<think>" * (LARGE // 7),
    "wrong stages": synopsis(stages="[" + "0," * (LARGE // 2) + "0]"),
    "wrong anchors": synopsis(anchors="[" + "-1," * (LARGE // 3) + "0]"),
    "wrong fields": "{" + ",".join(f'"{index}":0' for index in range(LARGE // 9)) + "}",
    "many prompts": json.dumps([{"prompt": f"{n}", "stages": ["a"]} for n in range(LARGE // 40)]),
    "the same": f"[{SAME}, {SAME}]",
    "many anchors": synopsis(anchors=json.dumps([*range(LARGE // 8)])),
    "many stages": json.dumps({"prompt": "p", "stages": ["a"] * (LARGE // 5)}),
    "one stage": json.dumps({"prompt": "p", "stages": ["é" * (LARGE // 6)]}),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_megabyte_is_read_in_under_a_second(kind):
    vk.Synopsis.from_json(json.dumps(GOOD))  # the form is made once
    for text in (FLOODS[kind], json.dumps({"prompt": "p", "stages": [FLOODS[kind]]})):
        start, problem = time.process_time(), ""  # of this process: the machine may be busy
        try:
            vk.Synopsis.list_from_json(text)
        except FormatError as error:
            problem = str(error)
        assert time.process_time() - start < 1
        assert len(problem) < 1000
