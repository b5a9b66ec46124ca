"""A server that speaks the chat completions interface, on this machine, and its ways to fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text):
    """The body of an answer, as the interface has it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


def answers(text):
    """Answer with a text."""
    return lambda handler: handler.reply(200, completion(text))


def tells(*stages):
    """Answer with a synopsis of these stages, in the form that is asked for."""
    return answers(json.dumps({"stages": stages}, ensure_ascii=False))


def without_structure(then, message="'response_format' of type 'json_schema' is not supported"):
    """Refuse to hold the answer to a schema, as some servers do; otherwise do something else."""

    def act(handler):
        refused = "response_format" in handler.request_body
        (fails(400, message) if refused else then)(handler)

    return act


def fails(status, text="out of order", **headers):
    """Answer with an error."""
    body = json.dumps({"error": {"message": text}}).encode()
    return lambda handler: handler.reply(status, body, headers)


def says(body, content_type="application/json"):
    """Answer with any bytes."""
    return lambda handler: handler.reply(200, body, {"Content-Type": content_type})


def sleeps(seconds):
    """Say nothing for a while, then answer."""

    def act(handler):
        time.sleep(seconds)
        tells("Too late.", "Too late.")(handler)

    return act


def drips(seconds):
    """Send one byte after the other, never pausing for long."""

    def act(handler):
        body = completion(json.dumps({"stages": ["Too slow.", "Too slow."]}))
        handler.start(200, len(body), {})
        for index in range(len(body)):
            handler.wfile.write(body[index : index + 1])
            handler.wfile.flush()
            time.sleep(seconds / len(body))

    return act


def drips_headers(seconds):
    """Send one header after the other, never pausing for long."""

    def act(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for index in range(50):
            handler.wfile.write(b"X-Header-%d: slow\r\n" % index)
            handler.wfile.flush()
            time.sleep(seconds / 50)
        handler.wfile.write(b"Content-Length: 0\r\n\r\n")

    return act


def speaks(raw):
    """Send any bytes, headers and all, and close the connection."""

    def act(handler):
        handler.wfile.write(raw)
        handler.close_connection = True

    return act


def breaks_off(handler):
    """Close the connection in the middle of the answer."""
    handler.start(200, 10_000, {})
    handler.wfile.write(b'{"choices": [')


def hangs_up(handler):
    """Close the connection without an answer."""
    handler.close_connection = True


class ChatServer:
    """Does one thing after the other, the last one for good; ``requests`` is what it was asked."""

    def __init__(self, *script):
        self.script = list(script)
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                assert self.path.split("?")[0] == "/v1/chat/completions", self.path
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.request_body = json.loads(body)
                server.requests.append(self.request_body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                try:
                    script = server.script
                    (script.pop(0) if len(script) > 1 else script[0])(self)
                except OSError:  # the client has given up
                    self.close_connection = True

            def start(self, status, length, headers):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()

            def reply(self, status, body, headers=None):
                renamed = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
                self.start(status, len(body), renamed)
                self.wfile.write(body)

            def log_message(self, *_: Iterable):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
