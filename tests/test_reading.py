"""Hostile documents: each is one kind of error, that names the field, and is read in no time."""

import json
import os
import re
import time

import pytest

import vstar_kernels as vk
from vstar_kernels import reading
from vstar_kernels.methods.vstar.writer import SynopsisError
from vstar_kernels.reading import FormatError, clean, decode, decode_yaml, shorten

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
        (synopsis(prompt="9" * 300), r"prompt: Input should be a valid string, got int"),
        (synopsis(prompt="9" * 400), r"prompt: 9+… is a number of too many digits"),
        (
            synopsis(anchors=f"[0, {'9' * 400}]"),
            r"anchors\[1\]: 9+… is a number of too many digits",
        ),
        (synopsis(anchors=f"[0, {2**31}]"), r"anchors\[1\]: .*less than or equal to 2147483647"),
        (synopsis(anchors=f"[0, {'9' * 5000}]"), r"anchors\[1\]: 9+… is a number of too many"),
        (synopsis(anchors="[0, 1e999]"), r"anchors\[1\]: 1e999 is too large"),
        (synopsis(anchors="[0, 1e9]"), r"anchors\[1\]: .*valid integer, got float"),
        (synopsis(anchors="[0, -1]"), r"anchors\[1\]: .*greater than or equal to 0"),
        (synopsis(anchors="[0, NaN]"), r"anchors\[1\]: NaN is not a number"),
        (synopsis(anchors="[0, true]"), r"anchors\[1\]: .*valid integer, got bool"),
        (synopsis(anchors='"01"'), "anchors: .*valid list, got str"),
        (synopsis(prompt='"p", "prompt": "q"'), "prompt: it is there twice"),
        (synopsis(prompt='"p", "pro\\u0000mpt": "q"'), "prompt: it is there twice"),
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
    with pytest.raises(FormatError, match=r"nested|not JSON|number|twice|too large|\[0\]: "):
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


READERS = {
    "configuration": vk.TARConfig.load,
    "synopsis": vk.Synopsis.load,
    "synopses": lambda path: vk.SynopsisWriter.from_file(path).write("p"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_an_error_at_once(tmp_path, read, make):
    make(tmp_path / "place")
    with pytest.raises((OSError, SynopsisError), match="is not a regular file"):
        read(tmp_path / "place")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_bytes_that_are_no_text(tmp_path, read):
    path = tmp_path / "place"
    path.write_bytes(b'{"sigma": "\xff"}')
    with pytest.raises((FormatError, SynopsisError), match=r"it is not UTF-8: .* at byte 11"):
        read(path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + vk.TARConfig(1.0).to_json().encode())
    assert vk.TARConfig.load(tmp_path / "config.json") == vk.TARConfig(1.0)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="has more than 67108864 bytes"):
        vk.Synopsis.load(tmp_path / "sparse")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"a": [1, {"b": NaN}]}', "a[1].b: NaN is not a number in JSON"),
        ('{"a": [1, {"b": -1e400}]}', "a[1].b: -1e400 is too large"),
        ('[{"a": 1, "a": 2}]', "[0].a: it is there twice"),
        ('[{"a": NaN, "a": [NaN], "a": 1}]', "[0].a: it is there twice"),
        ('{"\\u001b[31ma": Infinity}', "a: Infinity is not a number in JSON"),
        ("-Infinity", "-Infinity is not a number in JSON"),
        ('{"x":' * 20 + "NaN" + "}" * 20, "….x.x.x.x.x.x.x.x: NaN is not a number in JSON"),
    ],
)
def test_what_json_should_not_hold_is_named_by_its_path(document, message):
    with pytest.raises(FormatError) as caught:
        decode(document)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("seeds: 2\noptions: {}\nseeds: 3\n", "line 3: seeds is there twice, first in line 1"),
        ("a:\n  - {b: 1, c: 2, b: 3}\n", "line 2: b is there twice, first in line 2"),
        ("a: &x {b: 1,\n  b: 2}\nc: *x\n", "line 2: b is there twice, first in line 1"),
        ("1: a\n0x1: b\n", "line 2: 0x1 is there twice, first in line 1"),
        ("1: a\n'1': b\n", "1: it is there twice"),
        ("a: {<<: {b: 1}, <<: {c: 2}}", "line 1: << is there twice, first in line 1"),
        ("[" * 3000, "it is nested too deeply"),
        ("? [a, b]\n: 1", "it is not YAML of texts, numbers, lists and objects"),
        ("a: .nan", "a: NaN is not a number in JSON"),
        ("&a [*a]", "lists and objects: Circular reference"),
        ("a: 2024-13-45", "lists and objects: month must be in 1..12"),
        ("!!bool maybe", "it is not YAML of texts, numbers, lists and objects"),
        ("!!timestamp abc", "it is not YAML of texts, numbers, lists and objects"),
        ('!!int ""', "it is not YAML of texts, numbers, lists and objects"),
    ],
)
def test_what_yaml_should_not_hold(document, message):
    pytest.importorskip("yaml")
    with pytest.raises(FormatError, match=re.escape(message)):
        decode_yaml(document)


def test_yaml():
    pytest.importorskip("yaml")
    merged = "outer: {base: &b {<<: &a {x: 1, y: 1}, x: 2}}\nc: {<<: *b, y: 3}\nagain: *a\n"
    assert decode_yaml(merged) == {
        "outer": {"base": {"x": 2, "y": 1}},
        "c": {"x": 2, "y": 3},
        "again": {"x": 1, "y": 1},
    }
    assert decode_yaml("") is None
    assert decode_yaml(
        "[1e3, -.5E-1, 1.e+2, 1e, e3, x1e3, '1e3', 2e5 cats, 1e3x, 1e5.5, 7e1f]"
    ) == [
        1000.0,
        -0.05,
        100.0,
        "1e",
        "e3",
        "x1e3",
        "1e3",
        "2e5 cats",
        "1e3x",
        "1e5.5",
        "7e1f",
    ]
    for unreadable in ("1e999", r'"\UFFFFFFFF"', "1" + 200 * ":0" + ":0."):
        with pytest.raises(FormatError):
            decode_yaml(unreadable)
    assert decode_yaml("[{a: 1}, {a: 2}]") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "more", ["[{}, {}]", "{{a: {}, b: {}}}", "{{<<: [{}, {}]}}", "{{? {} : {}}}"]
)
def test_anchors_that_repeat_each_other_without_end(more):
    pytest.importorskip("yaml")
    lines = ["- &a0 {x: 1}"]
    for level in range(1, 40):
        lines.append(f"- &a{level} " + more.format(f"*a{level - 1}", f"*a{level - 1}"))
    with pytest.raises(FormatError, match=re.escape("its anchors repeat more than 10,000,000 ")):
        decode_yaml("\n".join(lines))


def test_anchors_may_repeat_a_little_of_a_large_document(monkeypatch):
    pytest.importorskip("yaml")
    monkeypatch.setattr(reading, "MOST_REPEATED", 12)
    text = "[&a abc, " + ", ".join(map(str, range(20))) + ", *a, *a, *a]"
    assert decode_yaml(text)[-3:] == ["abc"] * 3
    with pytest.raises(FormatError, match="its anchors repeat more than 12 characters"):
        decode_yaml(text[:-1] + ", *a]")


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
def test_a_megabyte_takes_no_quadratic_work(kind):
    """A megabyte takes some tenths of a second; quadratic work would take minutes."""
    vk.Synopsis.from_json(json.dumps(GOOD))  # the form is made once
    for text in (FLOODS[kind], json.dumps({"prompt": "p", "stages": [FLOODS[kind]]})):
        start, problem = time.process_time(), ""  # of this process: the machine may be busy
        try:
            vk.Synopsis.list_from_json(text)
        except FormatError as error:
            problem = str(error)
        assert time.process_time() - start < 10
        assert len(problem) < 1000
