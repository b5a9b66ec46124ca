"""Synopses from servers, files and the cache; servers are real ones, on this machine."""

import json
import logging
import sys
import time
import traceback

import pytest

import vstar_kernels as vk
from vstar_kernels import files
from vstar_kernels.methods.llm import cache as cache_module
from vstar_kernels.methods.vstar.writer import (
    EXAMPLE_STAGES,
    SynopsisError,
    conversation,
    stages_form,
)

pytest.importorskip("openai")
import openai

from tests.methods.chat_server import (
    ChatServer,
    answers,
    breaks_off,
    drips,
    fails,
    hangs_up,
    says,
    sleeps,
    tells,
)

PROMPT = "A pond freezes over."
STAGES = ("Open water in a pond.", "Thin ice on a pond.", "Thick ice on a pond.")
ANSWER = json.dumps({"stages": STAGES})
GOOD = answers(ANSWER)
KEY = "sk-test-4242424242"


pytestmark = pytest.mark.usefixtures("nobody")


def writer(server, **settings):
    settings = {"timeout": 5.0, "api_key": KEY, **settings}
    return vk.SynopsisWriter.from_endpoint("tiny-chat", base_url=server.url, **settings)


def test_a_synopsis():
    with ChatServer(GOOD) as server:
        synopsis = writer(server, options={"temperature": 0.5}).write(PROMPT, num_stages=3)
    assert synopsis == vk.Synopsis(PROMPT, STAGES)
    (request,) = server.requests
    assert (request["model"], request["temperature"]) == ("tiny-chat", 0.5)
    roles = [message["role"] for message in request["messages"]]
    assert roles == ["system", "user", "assistant", "user"]  # the rules, one example, the question
    question = request["messages"][-1]["content"]
    assert question.startswith(
        f"Video: {PROMPT}\nNumber of stages: 3\n\nAnswer with one JSON object"
    )
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_the_example_keeps_to_the_rules():
    messages = conversation(PROMPT, 2, 4)
    example = json.loads(messages[2]["content"])
    assert stages_form(5, 5).model_validate(example).stages == EXAMPLE_STAGES
    assert all(len(stage.split()) <= 25 for stage in EXAMPLE_STAGES)
    assert messages[1]["content"].endswith(f"Number of stages: {len(EXAMPLE_STAGES)}")
    assert messages[-1]["content"].endswith("Number of stages: 2 to 4")


def test_settings_from_the_environment(monkeypatch):
    with ChatServer(GOOD) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_MODEL", "from-the-environment")
        assert vk.SynopsisWriter.from_endpoint().write(PROMPT).stages == STAGES
    assert server.requests[0]["model"] == "from-the-environment"
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_a_local_server_needs_no_key():
    with ChatServer(GOOD) as server:
        assert writer(server, api_key=None).write(PROMPT).stages == STAGES


@pytest.mark.parametrize(
    "failure",
    [
        fails(500),
        fails(503, retry_after="0"),
        fails(429),
        says(b"{"),
        says(b""),
        says(b"<html>busy</html>", "text/html"),
        says(b'{"choices": []}'),
        says(b'{"choices": [{"message": {"content": null}}]}'),
        says(b'"text"'),
        says(b"\xff\xfe"),
        breaks_off,
        hangs_up,
        answers(""),
        answers("I cannot help with that."),
    ],
)
def test_what_fails_once_is_tried_again(failure):
    with ChatServer(failure, GOOD) as server:
        assert writer(server).write(PROMPT).stages == STAGES
    assert len(server.requests) == 2


@pytest.mark.parametrize("slow", [sleeps(30), drips(3)])
def test_slow_answers_are_given_up(slow):
    with ChatServer(slow, GOOD) as server:
        start = time.monotonic()
        assert writer(server, timeout=0.3).write(PROMPT).stages == STAGES
        assert time.monotonic() - start < 2.5
        server.script = [slow]
        with pytest.raises(SynopsisError, match=r": no answer in 0\.3 s \(asked 2 times\)$"):
            writer(server, timeout=0.3, attempts=2).write("Another pond.")


def test_attempts_are_limited():
    with ChatServer(fails(500, "no room left")) as server:
        with pytest.raises(SynopsisError) as caught:
            writer(server, attempts=4).write(PROMPT)
        assert len(server.requests) == 4
    message = str(caught.value)
    assert message.startswith(f"no synopsis of '{PROMPT}' from tiny-chat at {server.url}/: ")
    assert message.endswith("HTTP status 500: no room left (asked 4 times)")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_will_not_change_is_not_tried_again(status):
    with ChatServer(fails(status)) as server:
        with pytest.raises(SynopsisError, match=f"HTTP status {status}: .*out of order"):
            writer(server).write(PROMPT)
        assert len(server.requests) == 1


def test_nobody_listens():
    with ChatServer(GOOD) as server:
        pass
    with pytest.raises(SynopsisError, match=r": no connection: Connection refused \(asked 3"):
        writer(server).write(PROMPT)


def test_the_waits_grow_and_a_server_may_name_them(monkeypatch):
    waits = []

    async def wait(seconds):
        waits.append(seconds)

    monkeypatch.undo()
    monkeypatch.setattr(openai._base_client.anyio, "sleep", wait)
    script = [fails(500), fails(503, retry_after="7"), fails(429)]
    with ChatServer(*script, GOOD) as server:
        writer(server, attempts=4, cache=False).write(PROMPT)
    assert 0.3 < waits[0] < 0.6
    assert waits[1] == 7.0
    assert 1.2 < waits[2] < 2.1
    with ChatServer(fails(429, retry_after="9999")) as server:  # nobody waits for so long
        with pytest.raises(SynopsisError, match="HTTP status 429"):
            writer(server, cache=False).write(PROMPT)
        assert (len(server.requests), len(waits)) == (1, 3)


def test_an_unusable_answer_is_sent_back_with_what_is_wrong():
    with ChatServer(GOOD, tells(*STAGES, "Snow on a pond.")) as server:
        synopsis = writer(server).write(PROMPT, num_stages=4)
    assert len(synopsis.stages) == 4
    assert server.requests[1]["messages"][:4] == server.requests[0]["messages"]
    answer, demand = server.requests[1]["messages"][4:]
    assert answer == {"role": "assistant", "content": ANSWER}
    assert "expected 4 stages, found 3" in demand["content"]


def test_the_error_shows_the_answer():
    with (
        ChatServer(answers("What  is it about? " + 500 * "x")) as server,
        pytest.raises(SynopsisError, match="no complete JSON object") as caught,
    ):
        writer(server, attempts=1).write(PROMPT)
    assert "in 'What is it about? xxx" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_flood_is_stopped():
    flood = says(b" " * (2**20 + 1))
    with ChatServer(flood) as server, pytest.raises(SynopsisError, match="more than 1048576 bytes"):
        writer(server).write(PROMPT)


def test_the_key_is_nowhere(caplog, tmp_path):
    """Not in errors and their causes, logs, the cache or representations; not even if echoed."""
    caplog.set_level(logging.DEBUG)
    echoes = [
        fails(401, f"wrong key {KEY}"),
        says(f"who is {KEY}?".encode()),
        says((290 * "x" + KEY).encode()),  # where messages are cut
        answers(f"no list for {KEY}"),
    ]
    for echo in echoes:
        with ChatServer(echo) as server, pytest.raises(SynopsisError) as caught:
            writer(server, attempts=1).write(PROMPT)
        shown = "".join(traceback.format_exception(caught.value)) + repr(vars(caught.value))
        assert "sk-test" not in shown
        error = caught.value
        while error is not None:
            assert "openai" not in type(error).__module__  # it has the request and its headers
            error = error.__cause__ or error.__context__
    with ChatServer(tells(f"A pond {KEY}.", "Ice.")) as server:
        echoed = writer(server)
        assert echoed.write(PROMPT).stages == ("A pond [key].", "Ice.")
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1
    assert "sk-test" not in files[0].read_text() + files[0].name + caplog.text
    assert "sk-test" not in repr(echoed) + repr(echoed._source) + json.dumps(echoed._source.key)


def test_the_cache_answers_the_same_request():
    with ChatServer(GOOD, tells("Water.", "Ice.", "Snow.")) as server:
        first = writer(server).write(PROMPT)
        assert writer(server, api_key="another-key").write(PROMPT) == first
        assert len(server.requests) == 1
        changes = [
            lambda: writer(server).write("A lake freezes over."),
            lambda: writer(server).write(PROMPT, num_stages=3),
            lambda: writer(server, options={"temperature": 1.0}).write(PROMPT),
            lambda: writer(server, most_stages=5).write(PROMPT),
            lambda: writer(server, cache=False).write(PROMPT),
        ]
        for count, change in enumerate(changes, start=2):
            change()
            assert len(server.requests) == count
        assert writer(server).write(PROMPT) == first
        replaced = writer(server).write(PROMPT, refresh=True)
        assert replaced.stages == ("Water.", "Ice.", "Snow.")
        assert writer(server).write(PROMPT) == replaced


def test_failures_are_not_cached(tmp_path):
    with ChatServer(fails(500), GOOD) as server:
        with pytest.raises(SynopsisError):
            writer(server, attempts=1).write(PROMPT)
        assert not (tmp_path / "cache").exists()
        assert writer(server, attempts=1).write(PROMPT).stages == STAGES


def test_a_cache_that_does_not_work_is_a_warning(tmp_path):
    with ChatServer(GOOD) as server:
        writer(server, cache=tmp_path).write(PROMPT)
        (path,) = tmp_path.iterdir()
        path.write_text('{"request"')
        with pytest.warns(UserWarning, match=r"\.json in the cache cannot be read"):
            assert writer(server, cache=tmp_path).write(PROMPT).stages == STAGES
        assert json.loads(path.read_text())["answer"] == {"stages": list(STAGES)}
        with pytest.warns(UserWarning, match="cannot be written"):
            assert writer(server, cache=path / "below").write(PROMPT).stages == STAGES


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with ChatServer(GOOD) as server, pytest.warns(UserWarning, match="no space left"):
        writer(server, cache=tmp_path).write(PROMPT)
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_module.default_folder() == tmp_path / "cache"
    monkeypatch.delenv("VSTAR_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert str(cache_module.default_folder()) == "/some/where/vstar_kernels/synopses"
    monkeypatch.setenv("HOME", "/home/reader")
    for relative in ("", "below"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert str(cache_module.default_folder()) == "/home/reader/.cache/vstar_kernels/synopses"


def test_files(tmp_path):
    path = tmp_path / "synopses.json"
    synopses = [vk.Synopsis(PROMPT, STAGES, [0, 4, 9]), vk.Synopsis("A lake.", ["Day.", "Night."])]
    path.write_text(vk.Synopsis.list_to_json(synopses))
    from_file = vk.SynopsisWriter.from_file(path)
    assert [from_file.write(s.prompt) for s in synopses] == synopses
    with pytest.raises(
        SynopsisError, match=r"of 'A sea\.' from the file .*: it has none, but synopses of 'A p"
    ):
        from_file.write("A sea.")
    with pytest.raises(SynopsisError, match="expected 2 stages, found 3"):
        from_file.write(PROMPT, num_stages=2)
    path.write_text(synopses[0].to_json())
    assert from_file.write(PROMPT) == synopses[0]
    path.write_text('{"prompt": "A pond.", "stages": "none"}')
    with pytest.raises(
        SynopsisError, match=r"synopses\.json: not a synopsis: stages: .* valid list"
    ):
        from_file.write(PROMPT)
    assert not (tmp_path / "cache").exists()


def test_an_answer_in_a_file(tmp_path):
    path = tmp_path / "answer.json"
    path.write_text(ANSWER)
    assert vk.SynopsisWriter.from_file(path).write(PROMPT) == vk.Synopsis(PROMPT, STAGES)
    path.write_text(json.dumps(STAGES))
    assert vk.SynopsisWriter.from_file(path).write(PROMPT) == vk.Synopsis(PROMPT, STAGES)
    path.write_text("1. Open water.\n2. Ice.\n")
    with pytest.raises(
        SynopsisError, match=r'it is not JSON.*expected \{"prompt": …, "stages": \['
    ):
        vk.SynopsisWriter.from_file(path).write(PROMPT)
    path.write_text('{"stages": ["Open water.", 3]}')
    with pytest.raises(
        SynopsisError, match=r"stages\[1\]: Input should be a valid string, got int"
    ):
        vk.SynopsisWriter.from_file(path).write(PROMPT)
    with pytest.raises(SynopsisError, match=r"missing: it cannot be read"):
        vk.SynopsisWriter.from_file(tmp_path / "missing").write(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, r"model must be given, or be in \$OPENAI_MODEL"),
        ({"base_url": None}, r"api_key must be given, or be in \$OPENAI_API_KEY"),
        ({"base_url": "localhost:80/v1"}, "http or https address, got 'localhost:80/v1'"),
        ({"base_url": "http://me:secret@host/v1"}, "no credentials and no query"),
        ({"base_url": "http://host/v1?key=secret"}, "no credentials and no query"),
        ({"base_url": "me:secret@host/v1"}, "an http or https address"),
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"attempts": 0}, "attempts must be from 1 to 100, got 0"),
        ({"least_stages": 0}, "least_stages must be at least 1"),
        ({"least_stages": 5, "most_stages": 4}, "got 5 and 4"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        vk.SynopsisWriter.from_endpoint(
            **{"model": "m", "base_url": "http://localhost:1/v1", **arguments}
        )
    assert "secret" not in str(caught.value)


def test_wrong_requests():
    with ChatServer(GOOD) as server:
        for prompt in ("", "  ", None):
            with pytest.raises((TypeError, ValueError), match="prompt must "):
                writer(server).write(prompt)
        for count in (1, 13):
            with pytest.raises(ValueError, match=f"num_stages must be from 2 to 12, got {count}"):
                writer(server).write(PROMPT, num_stages=count)
    assert not server.requests


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'vstar_kernels\[synopsis\]'"):
        vk.SynopsisWriter.from_endpoint("m", base_url="http://localhost:1/v1")


NOWHERE = {"model": "m", "base_url": "http://localhost:1/v1", "cache": False}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"timeout": "3"}, TypeError, "timeout must be a number of seconds, got str"),
        ({"timeout": True}, TypeError, "timeout must be a number of seconds, got bool"),
        ({"timeout": None}, TypeError, "timeout must be a number of seconds, got NoneType"),
        ({"timeout": 0}, ValueError, "timeout must be more than 0 seconds, and finite, got 0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be more than 0 seconds"),
        ({"timeout": float("inf")}, ValueError, "timeout must be more than 0 seconds"),
        ({"timeout": 10**5000}, ValueError, "timeout must be .* got one of more than 30 digits"),
        ({"attempts": 1.5}, TypeError, "attempts must be an integer, got float"),
        ({"attempts": "3"}, TypeError, "attempts must be an integer, got str"),
        ({"attempts": True}, TypeError, "attempts must be an integer, got bool"),
        ({"attempts": 0}, ValueError, "attempts must be from 1 to 100, got 0"),
        ({"attempts": 10**5000}, ValueError, "attempts must be from 1 to 100, got one of more"),
        ({"model": 5}, TypeError, "model must be a text, got int"),
        ({"model": b"m"}, TypeError, "model must be a text, got bytes"),
        ({"model": "a\x1b[31m"}, ValueError, "model must hold no control characters"),
        ({"base_url": 5}, TypeError, "base_url must be a text, got int"),
        ({"base_url": "http://a b/v1"}, ValueError, "base_url must be one word"),
        ({"base_url": "http://a\nb/v1"}, ValueError, "base_url must be one word"),
        ({"base_url": "http://[::1"}, ValueError, "base_url must have a host"),
        ({"api_key": 5}, TypeError, "api_key must be a text, got int"),
        ({"options": 5}, TypeError, "options must be a dictionary, got int"),
        ({"options": {"temprature": 1}}, ValueError, "options: there is no 'temprature'"),
        ({"options": {"messages": []}}, ValueError, "options: there is no 'messages'"),
        ({"options": {"stream": True}}, ValueError, "options: there is no 'stream'"),
        ({"options": {1: 2}}, ValueError, "options: there is no 1"),
        ({"options": {"temperature": float("nan")}}, ValueError, "what JSON can hold"),
        ({"options": {"stop": object()}}, ValueError, "what JSON can hold"),
        ({"options": {"stop": "\ud800"}}, None, ""),
        ({"options": {"extra_headers": 5}}, TypeError, "must be a dictionary of texts"),
        ({"options": {"extra_headers": {"a": 5}}}, TypeError, "must be a dictionary of texts"),
        ({"least_stages": 1.0}, TypeError, "least_stages must be an integer, got float"),
        ({"most_stages": "3"}, TypeError, "most_stages must be an integer, got str"),
        ({"least_stages": 5, "most_stages": 4}, ValueError, "least_stages must be at most"),
        ({"cache": None}, TypeError, "cache must be True, False or a folder, got None"),
        ({"cache": ""}, TypeError, "cache must be True, False or a folder, got ''"),
    ],
)
def test_wrong_settings_are_named(settings, error, message):
    given = {**NOWHERE, **settings}
    if error is None:
        vk.SynopsisWriter.from_endpoint(**given)
        return
    with pytest.raises(error, match=message) as caught:
        vk.SynopsisWriter.from_endpoint(**given)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("source", [5, None, "llama3", object()])
def test_what_is_no_source(source):
    with pytest.raises(TypeError, match="source must be a language model or a SynopsisFile, got"):
        vk.SynopsisWriter(source)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_stages": "3"}, TypeError, "num_stages must be an integer, got str"),
        ({"num_stages": 3.0}, TypeError, "num_stages must be an integer, got float"),
        ({"num_stages": True}, TypeError, "num_stages must be an integer, got bool"),
        ({"num_stages": 13}, ValueError, "num_stages must be from 2 to 12, got 13"),
        ({"num_stages": 10**5000}, ValueError, "num_stages must be from 2 to 12, got one of"),
        ({"refresh": "no"}, TypeError, "refresh must be True or False, got str"),
        ({"prompt": 5}, TypeError, "prompt must be a text, got int"),
        ({"prompt": " "}, ValueError, "prompt must not be empty"),
        ({"prompt": "\ud800"}, ValueError, "prompt must hold no halves of characters"),
    ],
)
def test_wrong_questions_are_not_asked(arguments, error, message):
    with ChatServer(GOOD) as server:
        with pytest.raises(error, match=message):
            writer(server).write(**{"prompt": PROMPT, **arguments})
        assert not server.requests
