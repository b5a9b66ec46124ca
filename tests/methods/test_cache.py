"""Damaged entries of the cache: each is a warning, and the model is asked again."""

import json
import os
import time
import warnings

import pytest

import vstar_kernels as vk

pytest.importorskip("openai")
from tests.methods.chat_server import ChatServer, tells

pytestmark = pytest.mark.usefixtures("nobody")
PROMPT = "A pond freezes over."
STAGES = ("Open water.", "Ice.")


def write(server, folder):
    writer = vk.SynopsisWriter.from_endpoint("m", base_url=server.url, cache=folder)
    return writer.write(PROMPT).stages


def with_answer(text):
    """An entry of the right request, with another answer, as JSON."""
    return lambda entry: json.dumps({**entry, "answer": None}).replace(
        '"answer": null', f'"answer": {text}'
    )


DAMAGES = {
    "a string": lambda entry: '"text"',
    "a list": lambda entry: "[1]",
    "another request": lambda entry: json.dumps({**entry, "request": {"a": 1}}),
    "no answer": lambda entry: json.dumps({"request": entry["request"]}),
    "nothing": lambda entry: "",
    "not JSON": lambda entry: "{",
    "not UTF-8": lambda entry: b"\xff\xfe",
    "zeros": lambda entry: b"\0" * 1000,
    "deep": lambda entry: '{"request": ' * 100_000,
    "a deep answer": with_answer("[" * 100_000 + "]" * 100_000),
    "large": lambda entry: " " * 2**22,
    "a string as the answer": with_answer('"text"'),
    "a dictionary as the stages": with_answer('{"stages": {"a": "b"}}'),
    "a string as the stages": with_answer('{"stages": "text"}'),
    "a number as a stage": with_answer('{"stages": ["Water.", 3]}'),
    "an empty stage": with_answer('{"stages": ["Water.", " "]}'),
    "100 stages": with_answer(json.dumps({"stages": ["Water."] * 100})),
    "1 stage": with_answer('{"stages": ["Water."]}'),
    "more fields": with_answer('{"stages": ["Water.", "Ice."], "anchors": [0, 1]}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_a_warning(tmp_path, damage):
    with ChatServer(tells(*STAGES)) as server:
        assert write(server, tmp_path) == STAGES
        (path,) = tmp_path.iterdir()
        damaged = DAMAGES[damage](json.loads(path.read_text()))
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        with pytest.warns(UserWarning, match=r"\.json in the cache cannot be read: ") as caught:
            assert write(server, tmp_path) == STAGES
        assert len(caught) == 1
        assert len(str(caught[0].message)) < 600
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert write(server, tmp_path) == STAGES
    assert len(server.requests) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_does_not_hang(tmp_path, make):
    with ChatServer(tells(*STAGES)) as server:
        write(server, tmp_path)
        (path,) = tmp_path.iterdir()
        path.unlink()
        make(path)
        start = time.monotonic()
        with pytest.warns(UserWarning, match="in the cache cannot be") as caught:
            assert write(server, tmp_path) == STAGES
        assert time.monotonic() - start < 30
    kinds = [str(warning.message).split("cannot be ")[1] for warning in caught]
    assert [kind.split(":")[0] for kind in kinds] == ["read", "written"]
    assert all("is not a regular file" in kind for kind in kinds)


def test_a_hostile_prompt_is_found_again(tmp_path):
    prompt = 'A "pond"\x1b[31m\u202e \\u0041 é 😀.'
    with ChatServer(tells(*STAGES)) as server:
        for _ in range(2):
            writer = vk.SynopsisWriter.from_endpoint("m", base_url=server.url, cache=tmp_path)
            assert writer.write(prompt).stages == STAGES
    assert len(server.requests) == 1
