"""Language models behind servers that are slow, hostile, or know no structured answers."""

import asyncio
import base64
import json
import logging
import signal
import ssl
import threading
import time
import traceback
import zlib
from unittest import mock
from urllib.parse import quote

import pytest

import vstar_kernels as vk
from vstar_kernels.methods.llm import endpoint
from vstar_kernels.methods.llm.ask import AnswerError, ask
from vstar_kernels.methods.llm.secrets import redact
from vstar_kernels.methods.vstar.writer import SynopsisError

pytest.importorskip("openai")
import httpx2

from tests.methods.chat_server import (
    ChatServer,
    answers,
    completion,
    drips,
    drips_headers,
    fails,
    says,
    speaks,
    tells,
    without_structure,
)

pytestmark = pytest.mark.usefixtures("nobody")
PROMPT = "A pond freezes over."
STAGES = ("Open water.", "Thin ice.", "Thick ice.")
GOOD = tells(*STAGES)
KEY = "sk-proj/Ab42_cd43+Ef44"


def writer(server, **settings):
    settings = {"timeout": 5.0, "api_key": KEY, "cache": False, **settings}
    return vk.SynopsisWriter.from_endpoint("tiny-chat", base_url=server.url, **settings)


def refused(server, **settings):
    """The message of the error, and all else that the error shows."""
    with pytest.raises(SynopsisError) as caught:
        writer(server, **settings).write(PROMPT)
    shown = traceback.format_exception(caught.value)
    return str(caught.value), "".join(shown) + repr(vars(caught.value))


# Structured answers


def test_servers_get_the_schema():
    with ChatServer(GOOD) as server:
        writer(server).write(PROMPT, num_stages=3)
    (request,) = server.requests
    shape = request["response_format"]["json_schema"]
    assert request["response_format"]["type"] == "json_schema"
    assert shape["strict"] is True
    assert shape["schema"]["required"] == ["stages"]
    assert shape["schema"]["additionalProperties"] is False
    stages = shape["schema"]["properties"]["stages"]
    assert (stages["minItems"], stages["maxItems"], stages["items"]) == (3, 3, {"type": "string"})
    assert json.dumps(shape["schema"]) in request["messages"][-1]["content"]


def test_certificates_are_read_once_for_what_the_environment_says(monkeypatch, tmp_path):
    """Reading them takes longer than a request to a local server."""
    endpoint._ssl_context.cache_clear()
    create = mock.Mock(wraps=httpx2.create_ssl_context)
    monkeypatch.setattr(httpx2, "create_ssl_context", create)
    with ChatServer(GOOD) as server:
        for _ in range(2):
            writer(server).write(PROMPT)
        assert create.call_count == 1
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
        writer(server).write(PROMPT)
    assert create.call_count == 2
    assert len(server.requests) == 3
    context = endpoint._ssl_context()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize(
    "message",
    [
        "'response_format' of type 'json_schema' is not supported",
        "This response_format type is unavailable now",
        "Invalid schema for response_format 'answer'",
        "failed to parse grammar",
    ],
)
def test_a_server_that_knows_no_schemas_is_asked_without(message):
    with ChatServer(without_structure(GOOD, message)) as server:
        from_endpoint = writer(server)
        assert from_endpoint.write(PROMPT).stages == STAGES
        assert from_endpoint.write(PROMPT).stages == STAGES
    first, *rest = server.requests
    assert "response_format" in first
    assert len(rest) == 2  # it is remembered
    assert all("response_format" not in request for request in rest)
    assert all(request["messages"] == first["messages"] for request in rest)


def test_what_is_refused_without_a_schema_too_is_an_error():
    with ChatServer(fails(400, "no response_format, no model")) as server:
        message, _ = refused(server)
        assert message.endswith("HTTP status 400: no response_format, no model")
        assert len(server.requests) == 2


def test_the_caller_may_choose_the_format():
    given = {"response_format": {"type": "json_object"}}
    with ChatServer(GOOD) as server:
        writer(server, options=given).write(PROMPT)
    assert server.requests[0]["response_format"] == {"type": "json_object"}


OBJECT = json.dumps({"stages": STAGES})


@pytest.mark.parametrize(
    "answer",
    [
        f"```json\n{OBJECT}\n```",
        f"```\n{OBJECT}\n```\n",
        f"<think>{{1. Water}}\n</think>\n\n{OBJECT}",
        f"1. Water {{}}\n</think>{OBJECT}",
        f"\ufeff{OBJECT}",
        f"Here you are: {OBJECT}",
    ],
)
def test_an_object_in_a_fence_or_after_reasoning(answer):
    with ChatServer(answers(answer)) as server:
        assert writer(server).write(PROMPT).stages == STAGES


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "the answer is empty"),
        (" \n\x1b[0m", "the answer is empty"),
        ("<think>1. A bud.</think>", "the answer is empty"),
        ("```json\n```", "no complete JSON object"),
        ("```json", "no complete JSON object"),
        ("1. Open water.\n2. Ice.", "no complete JSON object"),
        ('{"stages": ["Open water."', "no complete JSON object"),
        ("}{", "no complete JSON object"),
        ("{}", "stages: it is missing"),
        ('{"stages": ["a", "b"], "mood": 1}', "mood: there is no such field"),
        ('{"stages": {"1": "a", "01": "b"}}', "stages: .*valid list, got dict"),
        ('{"stages": ["a", "b"], "stages": ["c"]}', "stages: it is there twice"),
        ('{"stages": ["a", 3]}', r"stages\[1\]: .*valid string, got int"),
        ('{"stages": ["a", "…"]}', "stages: stage 2 has no text"),
        ('{"stages": ["a"]}', "stages: expected 2 to 12 stages, found 1"),
        (json.dumps({"stages": ["a"] * 100}), "expected 2 to 12 stages, found 100"),
        ('{"stages": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        (f'{{"stages": ["a", {"9" * 5000}]}}', "number of too many digits"),
        ('{"stages": ["a", NaN]}', "NaN is not a number"),
    ],
)
def test_an_answer_that_is_not_of_the_form_is_sent_back(answer, problem):
    with ChatServer(answers(answer), GOOD) as server:
        assert writer(server).write(PROMPT).stages == STAGES
        server.script = [answers(answer)]
        with pytest.raises(SynopsisError, match=problem) as caught:
            writer(server, attempts=1).write(PROMPT)
        assert len(str(caught.value)) < 900
    sent_back = server.requests[1]["messages"][-1]["content"]
    assert sent_back.startswith("That cannot be used: ")
    assert len(json.dumps(server.requests[1])) < 50_000


def test_a_refusal_is_said():
    body = json.loads(completion(None))
    body["choices"][0]["message"]["refusal"] = f"I will \x1b[31mnot, {KEY}."
    with ChatServer(says(json.dumps(body).encode())) as server:
        message, _ = refused(server, attempts=1)
    assert message.endswith("the model refuses: I will not, [key].")


def test_no_escape_sequence_comes_through():
    hostile = "\x1b]0;title\x07Open \x1b[31mwater\x1b[0m.\x00\x9b2J\u202e"
    with ChatServer(tells(hostile, "Ice.")) as server:
        assert writer(server).write(PROMPT).stages == ("Open water.", "Ice.")
    for failure in (fails(500, hostile), answers(hostile), says(hostile.encode())):
        with ChatServer(failure) as server:
            message, _ = refused(server, attempts=1)
        assert "Open water." in message
        assert message.isprintable()


# Keys


@pytest.mark.parametrize("around", ["{}\n", " {}\r\n", "\n{}", "\t{} "])
def test_a_line_break_around_the_key_is_left_out(monkeypatch, around):
    with ChatServer(GOOD) as server:
        writer(server, api_key=around.format(KEY)).write(PROMPT)
        monkeypatch.setenv("OPENAI_API_KEY", around.format(KEY))
        monkeypatch.setenv("OPENAI_MODEL", "m\n")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}\n")
        vk.SynopsisWriter.from_endpoint(cache=False).write(PROMPT)
    assert [headers["authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 2
    assert server.requests[1]["model"] == "m"


@pytest.mark.parametrize("inside", ["\n", "\r\n", "\0", " ", "é", "\x1b", "\ud800", "\u200b"])
def test_a_key_that_is_no_word_is_refused_and_not_shown(inside):
    with pytest.raises(ValueError, match="api_key must be one word of printable ASCII") as caught:
        vk.SynopsisWriter.from_endpoint(
            "m", base_url="http://localhost:1/v1", api_key=f"sk-proj{inside}Ab42cd43"
        )
    shown = "".join(traceback.format_exception(caught.value))
    assert "Ab42" not in shown
    assert "sk-proj" not in shown


def in_letters(key):
    return "".join(f"\\u{ord(character):04x}" for character in key)


ECHOES = {
    "plainly": KEY,
    "slashes escaped": KEY.replace("/", "\\/"),
    "a letter escaped": KEY.replace("A", "\\u0041"),
    "letters escaped": in_letters(KEY),
    "escaped twice": in_letters(KEY).replace("\\", "\\\\"),
    "bold": "**".join(KEY),
    "tags": "<b>".join(KEY),
    "closing tags": KEY.replace("4", "<em class='x'>4</em>"),
    "controls": "\\u0000".join(KEY),
    "sequences": "\\u001b[31m".join(KEY),
    "no width": "\u200b".join(KEY),
    "lines": "\\n".join(KEY),
    "comments": "<!-- x -->".join(KEY),
    "long tags": f"<b {'x' * 200}>".join(KEY),
    "in an address": "".join(f"%{ord(character):02x}" for character in KEY),
    "in an address twice": quote(quote(KEY, safe=""), safe=""),
    "entities": "".join(f"&#{ord(character)};" for character in KEY),
    "named entities": KEY.replace("/", "&sol;").replace("_", "&lowbar;").replace("+", "&plus;"),
    "hexadecimal entities": "".join(f"&amp;#x{ord(character):x};" for character in KEY),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of a header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "base64 of credentials": base64.urlsafe_b64encode(f"u:{KEY}:x".encode()).decode(),
    "hexadecimal": KEY.encode().hex(" "),
    "quoted-printable": "".join(f"={ord(character):02X}" for character in KEY),
    "wide": "".join(chr(ord(x) + 0xFEE0) if x.isalnum() else x for x in KEY),
    "backwards": KEY[::-1],
    "capitals": KEY.upper(),
    "two stages": f'{KEY[:9]}", "{KEY[9:]}',
}


def letters(text):
    """What is left of a text when escapes, markup and punctuation are undone."""
    for character in KEY:
        for escape in (f"\\u{ord(character):04x}", f"\\\\u{ord(character):04x}"):
            text = text.replace(escape, character)
    for markup in ("<b>", "<em class='x'>", "</em>", "u0000", "u001b", "[31m", "\\n"):
        text = text.replace(markup, "")
    return "".join(filter(str.isalnum, text)).lower()


@pytest.mark.parametrize("way", ECHOES)
def test_a_key_that_a_server_repeats_is_nowhere(tmp_path, caplog, way):
    caplog.set_level(logging.DEBUG)
    echo, secret = ECHOES[way], letters(KEY)
    assert redact(f"so {echo} it is", [KEY]) != f"so {echo} it is"
    stages = f'{{"stages": ["A pond of {echo}.", "Ice."]}}'
    with ChatServer(answers(stages)) as server:
        try:
            found = writer(server, cache=tmp_path, attempts=2).write(PROMPT).stages
        except SynopsisError as error:
            found = (str(error),)
    kept = [path.read_text() for path in tmp_path.iterdir()]
    sent_back = [json.dumps(request, ensure_ascii=False) for request in server.requests[1:]]
    for text in ("".join(found), *kept, *sent_back):
        assert secret not in letters(text)
        assert echo not in text
    assert "[key]" in "".join(found)
    body = f'{{"error": {{"message": "wrong key {echo}", "type": "x"}}}}'
    error_bodies = [
        lambda handler: handler.reply(401, body.encode()),
        lambda handler: handler.reply(400, f"no response_format for {echo}".encode()),
        says(f'{{"choices": "{echo}"}}'.encode()),
        says(f'<html>"{echo}"</html>'.encode()),
        answers(f"no list for {echo}"),
        answers(f'{{"stages": {{"{echo}": 1}}, "{echo}": 3}}'),
        answers(f'{{"{echo}": 1, "{echo}": 3}}'),
    ]
    # Every body meets several ways; what undoes them is the same for all.
    index = list(ECHOES).index(way)
    for act in (error_bodies[index % 7], error_bodies[(index // 4 + 3) % 7]):
        with ChatServer(act) as server:
            message, shown = refused(server, attempts=1)
        assert secret not in letters(shown)
        assert echo not in shown
        assert "[key]" in message
    assert secret not in letters(caplog.text.replace("\n", " "))


def test_the_headers_of_the_callers_own_are_secrets():
    proxy_key = "proxy-key-987654321"
    options = {"extra_headers": {"X-Proxy-Key": proxy_key}, "extra_query": {"token": KEY}}
    with ChatServer(fails(403, f"not you, {proxy_key}")) as server:
        own = writer(server, options=options, api_key=None)
        with pytest.raises(SynopsisError, match=r"not you, \[key\]"):
            own.write(PROMPT)
    assert server.headers[0]["x-proxy-key"] == proxy_key
    assert proxy_key not in json.dumps(own._source.key) + own._source.name
    assert KEY not in json.dumps(own._source.key)


@pytest.mark.parametrize(
    "raw",
    [
        f"HTTP/1.1 500 {KEY}\r\nContent-Length: 0\r\n\r\n",
        f"HTTP/1.1 200 OK\r\n{KEY} : x\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Length: {KEY}\r\n\r\n",
        f"{KEY} 200\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nX: {KEY}\r\nContent-Length: 3\r\n\r\nabc",
        f"HTTP/1.1 302 {KEY}\r\nLocation: {KEY}://x\r\nContent-Length: 0\r\n\r\n",
        f"HTTP/1.1 307 x\r\nLocation: http://{KEY}:x@y:z/\r\nContent-Length: 0\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: {KEY}\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Type: x; charset={KEY}\r\nContent-Length: 1\r\n\r\n{{",
    ],
)
def test_no_message_is_made_of_a_header(raw, caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(speaks(raw.encode())) as server:
        _, shown = refused(server, attempts=1)
    assert "Ab42" not in caplog.text
    assert letters(KEY) not in letters(shown)
    assert "Ab42" not in shown


def test_a_redirect_is_not_followed(tmp_path):
    with ChatServer(answers("never")) as other:
        location = f"Location: {other.url}/chat/completions"
        with ChatServer(speaks(f"HTTP/1.1 307 Go\r\n{location}\r\n\r\n".encode())) as server:
            message, _ = refused(server, attempts=1)
        assert not other.requests
    assert message.endswith("HTTP status 307: it redirects; give base_url as it is there")


def test_logs_of_others_are_left_alone(caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(GOOD) as server:
        writer(server).write(PROMPT)
    logging.getLogger("httpx2").info("of %s", KEY)
    assert caplog.messages[-1] == f"of {KEY}"


def test_an_answer_that_is_compressed_is_not_unpacked():
    bomb = zlib.compress(b" " * 2**24)

    def act(handler):
        handler.reply(200, bomb, {"Content-Encoding": "deflate"})

    with ChatServer(act) as server:
        message, _ = refused(server, attempts=1)
    assert server.headers[0]["accept-encoding"] == "identity"
    assert message.endswith("a compressed answer, and none was asked for")


def test_no_charset_of_a_header_decodes_an_error():
    body = b"a-" * 100_000  # as punycode it takes minutes

    def act(handler):
        handler.reply(400, body, {"Content-Type": "text/plain; charset=punycode"})

    with ChatServer(act) as server:
        message, _ = refused(server, attempts=1)
    assert "HTTP status 400: a-a-a-" in message


@pytest.mark.parametrize("port", ["99999", "-1", "abc"])
def test_a_port_that_there_cannot_be(port):
    with pytest.raises(ValueError, match="base_url must have a host, and a port from 0 to 65535"):
        vk.SynopsisWriter.from_endpoint("m", base_url=f"http://127.0.0.1:{port}/v1")


# Time and size


@pytest.mark.parametrize("slow", [drips_headers(40), drips(40)], ids=["headers", "body"])
def test_the_timeout_is_for_the_whole_request(slow):
    with ChatServer(slow) as server:
        start = time.monotonic()
        message, _ = refused(server, timeout=1.0, attempts=1)
        assert time.monotonic() - start < 10
    assert message.endswith(": no answer in 1 s")


def test_the_timeout_is_for_the_look_up_of_the_host_too(monkeypatch):
    def slow(*_, **__):
        time.sleep(6)

    monkeypatch.setattr("socket.getaddrinfo", slow)
    asks = vk.SynopsisWriter.from_endpoint(
        "m", base_url="http://nowhere.invalid/v1", timeout=0.3, attempts=1, cache=False
    )
    start = time.monotonic()
    with pytest.raises(SynopsisError, match=r"no answer in 0\.3 s"):
        asks.write(PROMPT)
    assert time.monotonic() - start < 5


LARGE = 2**20 - 2**12


@pytest.mark.parametrize(
    "text",
    [
        "[" * LARGE,
        "{" * LARGE,
        "{}" * (LARGE // 2),
        '{"stages": [' + "1," * (LARGE // 2 - 100) + "1]}",
        "{" + "9" * LARGE + "}",
        "```" * (LARGE // 3),
        "<think>" * (LARGE // 7),
        "</think>" * (LARGE // 8),
        KEY * (LARGE // len(KEY)),
        KEY[:-1] * (LARGE // (len(KEY) - 1)),
        "s" + "-" * (LARGE - 1),
        "s<b>" * (LARGE // 4),
        "<bs>" * (LARGE // 4),
        "\\u0073" * (LARGE // 6),
        "\\" * LARGE,
        "%25" * (LARGE // 3),
        "&" * LARGE,
        "&amp;" * (LARGE // 5),
        "&#" * (LARGE // 2),
        "=" * LARGE,
        "<" * LARGE,
        "\u0301\u0316" * (LARGE // 4),
        "s" * LARGE,
        "s<" * (LARGE // 2),
        "s" + "<b" * (LARGE // 2 - 1),
        ("s" + "-" * 1000) * (LARGE // 1001),
    ],
    ids=lambda text: text[:12],
)
def test_a_megabyte_of_an_answer_takes_no_quadratic_work(text):
    """A megabyte takes some tenths of a second; quadratic work would take minutes."""
    with ChatServer(GOOD) as server:
        source = writer(server)._source
        writer(server).write(PROMPT)  # what is done once
    from vstar_kernels.methods.vstar.writer import conversation, stages_form

    class Says:
        name, key, redact = "it", None, source.redact

        def answer(self, messages, schema):
            return text

    start = time.process_time()
    with pytest.raises(AnswerError) as caught:
        ask(Says(), conversation(PROMPT, 2, 12), stages_form(2, 12), attempts=1)
    assert time.process_time() - start < 10
    assert len(str(caught.value)) < 900


def test_in_an_event_loop_of_the_callers():
    async def notebook():
        return writer(server).write(PROMPT)

    with ChatServer(GOOD) as server:
        assert asyncio.run(notebook()).stages == STAGES


@pytest.fixture
def interrupts():
    """Interrupts that raise, also where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there are no such signals")
@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_the_request():
    main = threading.get_ident()
    with ChatServer(drips(60)) as server:

        def interrupt():
            while not server.requests:  # before, it may hit an import that goes on without it
                time.sleep(0.01)
            time.sleep(0.5)
            interrupted.append(time.monotonic())
            signal.pthread_kill(main, signal.SIGINT)

        interrupted = []
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            writer(server, timeout=50.0).write(PROMPT)
        assert time.monotonic() - interrupted[0] < 20
