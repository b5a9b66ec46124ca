"""A chat model behind an OpenAI-compatible HTTP interface.

Servers are not trusted: what they send is bounded in time and in size, their texts are cleaned
before anybody sees them, and no key gets out through them.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vstar_kernels.methods.arguments import check_integer, check_seconds
from vstar_kernels.methods.llm.ask import AnswerError, Messages, NoText
from vstar_kernels.methods.llm.secrets import redact, redacted_logs
from vstar_kernels.reading import FormatError, clean, decode, shorten

if TYPE_CHECKING:
    import ssl

MODEL_VARIABLE = "OPENAI_MODEL"
KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # which httpx2 reads
OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"  # the client insists on a key where local servers want none
LARGEST_BODY = 2**20  # bytes; answers have thousands
HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")  # of a response, that are used
SECRET_OPTIONS = ("extra_headers", "extra_query")  # where keys are, too; they are not stored
OWN_OPTIONS = ("self", "messages", "model", "stream", "stream_options", "n", "timeout")
# How servers refuse what they do not know, and name it in the body.
UNKNOWING = (400, 404, 422, 501)
UNSTRUCTURED = re.compile(r"response.?format|json.?schema|structured|grammar", re.IGNORECASE)


class Endpoint:
    """A chat model behind an OpenAI-compatible HTTP interface, asked with the ``openai`` client.

    The answer's schema is sent as the interface's ``response_format``. A server that refuses it is
    asked without, now and later: what the conversation says of the form must do then.

    Failing servers (timeouts, 408, 409, 429, 5xx, broken connections) are asked again by the
    client, which waits longer each time, or as long as the server's ``Retry-After`` says.

    The key goes into the requests' header and nowhere else: not into messages, the cache or
    :attr:`key`, not even where a server repeats it, plainly, escaped or broken up by markup.

    Args:
        model: The model's name there; None is ``$OPENAI_MODEL``.
        base_url: Such as ``"http://localhost:8000/v1"``; None is ``$OPENAI_BASE_URL``, or else
            OpenAI's.
        api_key: None is ``$OPENAI_API_KEY``; a server named by ``base_url`` may need none. Blanks
            and line breaks around it are left out.
        timeout: Seconds for a whole request, from the connection to the last byte of the answer.
        options: Of the request, such as ``{"temperature": 0.7}``.
        retries: How often the client repeats a request that failed.

    Raises:
        ImportError: ``openai`` is not installed.
        TypeError, ValueError: There is no model or key, or an argument is of the wrong kind or out
            of its range.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        options: Mapping[str, Any] | None = None,
        retries: int = 2,
    ) -> None:
        try:
            import httpcore2  # noqa: F401  (so that its loggers are there)
            import httpx2
            import openai
        except ImportError as error:
            raise ImportError(
                f"language models at a server need openai ({error}): "
                "pip install 'vstar_kernels[synopsis]'"
            ) from error
        model = _setting("model", model, MODEL_VARIABLE)
        base_url = _setting("base_url", base_url, URL_VARIABLE)
        api_key = _setting("api_key", api_key, KEY_VARIABLE)
        if not model:
            raise ValueError(f"model must be given, or be in ${MODEL_VARIABLE}, got none")
        if not model.isprintable():
            raise ValueError(f"model must hold no control characters, got {model[:100]!r}")
        if base_url:
            _check_url(base_url)
        elif not api_key:
            raise ValueError(f"api_key must be given, or be in ${KEY_VARIABLE}, got none")
        if not re.fullmatch(r"[!-~]*", api_key):  # and the message does not show it
            raise ValueError("api_key must be one word of printable ASCII characters")
        check_seconds("timeout", timeout)
        check_integer("retries", retries, 0)
        options = _checked_options(options)
        self._openai, self._connect_error = openai, httpx2.ConnectError
        self._timeout = timeout
        self._url = (base_url or OPENAI_URL).rstrip("/") + "/"
        self._settings: dict[str, Any] = {
            "api_key": api_key or NO_KEY,
            "base_url": self._url,
            "max_retries": retries,
            "timeout": timeout,
        }
        self._request = {"model": model, **options}
        hidden = [value for name in SECRET_OPTIONS for value in options.get(name, {}).values()]
        # Whole values, and their words: of "Bearer KEY" a server may repeat the key alone.
        self._secrets = [api_key, *hidden, *(word for value in hidden for word in value.split())]
        self._structured = True
        self.name = f"{model} at {self._url}"

    @property
    def key(self) -> dict[str, Any]:
        """The server, the model and the options, but for what may be secret in them."""
        shown = {name: self._request[name] for name in self._request if name not in SECRET_OPTIONS}
        return {"base_url": self._url, **shown}

    def redact(self, text: str) -> str:
        """Returns a text without the key, in whichever way it is written there."""
        return redact(text, self._secrets)

    def answer(self, messages: Messages, schema: dict[str, Any]) -> str:
        """Returns the text that the model gives for a conversation.

        Raises:
            AnswerError: None came in time, or not in the interface's form.
        """
        from anyio.from_thread import start_blocking_portal

        # In a thread of its own, as there may be an event loop in this one: notebooks have one.
        with redacted_logs(self.redact), start_blocking_portal("asyncio") as portal:
            body = portal.call(self._fetch, messages, schema)
        return self._content(body.decode("utf-8", errors="replace"))

    async def _fetch(self, messages: Messages, schema: dict[str, Any]) -> bytes:
        """Returns the body of the response."""
        shape = {"name": "answer", "schema": schema, "strict": True}
        structure = {"response_format": {"type": "json_schema", "json_schema": shape}}
        request = {**(structure if self._structured else {}), **self._request}
        openai = self._openai
        asyncio.get_running_loop().set_default_executor(Unawaited(max_workers=1))
        bounded = bounded_client(self._timeout)
        async with openai.AsyncOpenAI(http_client=bounded, **self._settings) as client:
            try:
                create = client.chat.completions.with_raw_response.create
                response = await create(messages=messages, **request)
                return response.http_response.content
            except openai.APIStatusError as error:
                failure = self._status_failure(error)
                said = error.status_code in UNKNOWING and UNSTRUCTURED.search(error.response.text)
                unstructured = self._structured and said
            except openai.APITimeoutError:
                failure, unstructured = f"no answer in {self._timeout:g} s", None
            except openai.OpenAIError as error:
                failure, unstructured = self._connection_failure(error), None
        # Here, and not above: the client's errors, which hold the key, are no part of this one.
        if unstructured:
            self._structured = False
            return await self._fetch(messages, schema)
        times = f" (asked {bounded.requests} times)" if bounded.requests > 1 else ""
        raise AnswerError(f"{failure}{times}")

    def _status_failure(self, error: Any) -> str:
        """Returns what a status means, in the server's words, from the body alone."""
        if error.response.is_redirect:
            return f"HTTP status {error.status_code}: it redirects; give base_url as it is there"
        text = error.response.text  # UTF-8, as its headers are left out
        try:
            found = decode(text, lambda part: self.redact(clean(part)))["error"]
            text = found if isinstance(found, str) else found["message"]
        except (FormatError, LookupError, TypeError):
            pass  # not the interface's form: it is shown as it is
        shown = shorten(self.redact(clean(str(text)))) or "the server says nothing else"
        return f"HTTP status {error.status_code}: {shown}"

    def _connection_failure(self, error: Any) -> str:
        """Returns what is wrong with a connection, never in the words of a server's header."""
        cause = error.__cause__ or error
        if not isinstance(cause, self._connect_error):
            return f"the answer broke off ({type(cause).__name__})"
        first: BaseException = cause  # the operating system's, and not the libraries' around it
        while (below := first.__cause__ or first.__context__) is not None:
            first = below
        number = getattr(first, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else self.redact(clean(str(first)))
        return f"no connection: {shorten(reason)}"

    def _content(self, body: str) -> str:
        """Returns the text in a response of the chat completions interface."""
        try:
            message = decode(body, str)["choices"][0]["message"]
            content, refusal = message["content"], message.get("refusal")
        except (FormatError, LookupError, TypeError, AttributeError):
            shown = shorten(self.redact(clean(body))) or "nothing"
            raise NoText(f"not a chat completion: {shown}") from None
        if isinstance(refusal, str) and refusal:
            raise NoText(f"the model refuses: {shorten(self.redact(clean(refusal)))}")
        if not isinstance(content, str):
            raise NoText("a chat completion without a text")
        return content


class Unawaited(ThreadPoolExecutor):
    """A thread, for names of hosts to be looked up in, whose end nobody waits for.

    A look-up cannot be interrupted, and lasts as long as the system's resolver likes.
    """

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def bounded_client(seconds: float) -> Any:
    """Returns an HTTP client for ``openai`` that bounds each response in time and in size.

    The client's own timeouts are for the next byte, so that a server which sends one now and then
    would never reach them. The environment's proxies are used, as the client does.
    """
    import anyio
    import httpx2
    import openai

    class BoundedClient(openai.DefaultAsyncHttpxClient):
        requests = 0  # that were sent

        async def send(self, request: Any, *, stream: bool = False, **how: Any) -> Any:
            self.requests += 1
            body = bytearray()
            try:
                with anyio.fail_after(seconds):
                    response = await super().send(request, stream=True, **how)
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise AnswerError("a compressed answer, and none was asked for")
                    async for chunk in response.aiter_raw():
                        body += chunk
                        if len(body) > LARGEST_BODY:
                            break
                    await response.aclose()
            except TimeoutError:
                raise httpx2.ReadTimeout(f"more than {seconds:g} s", request=request) from None
            if len(body) > LARGEST_BODY:
                raise AnswerError(f"an answer of more than {LARGEST_BODY} bytes")
            # No more of the headers: their charset, say, may be one that takes hours to decode.
            headers = {name: value for name, value in response.headers.items() if name in HEADERS}
            return httpx2.Response(
                response.status_code, headers=headers, content=bytes(body), request=response.request
            )

    # A redirect would take along the headers of the caller's own, which may be keys.
    return BoundedClient(
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
        verify=_ssl_context(*map(os.environ.get, CERTIFICATE_VARIABLES)),
    )


@functools.lru_cache(maxsize=4)
def _ssl_context(*certificates: str | None) -> ssl.SSLContext:
    """Returns httpx2's default context, made once for each setting of the environment.

    To read the certificates takes tens of milliseconds. Files that change later are not read again.
    """
    import httpx2

    return httpx2.create_ssl_context()


def _setting(name: str, given: str | None, variable: str) -> str:
    """Returns what is given or else in the environment, without the blanks around it."""
    if given is not None and not isinstance(given, str):
        raise TypeError(f"{name} must be a text, got {type(given).__name__}")
    return (given or os.environ.get(variable) or "").strip()


def _check_url(base_url: str) -> None:
    if not base_url.isprintable() or " " in base_url:
        raise ValueError("base_url must be one word without control characters")
    try:
        parts = urlsplit(base_url)
        parts.port  # noqa: B018  (it is read here)
    except ValueError as error:
        problem = f"base_url must have a host, and a port from 0 to 65535: {shorten(str(error))}"
        raise ValueError(problem) from None
    if "@" in parts.netloc or parts.query or parts.fragment:  # they would be shown and stored
        raise ValueError("base_url must hold no credentials and no query: give the key as api_key")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = "one with an @" if "@" in base_url else repr(base_url)
        raise ValueError(f"base_url must be an http or https address, got {shown}")


def _checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the options of a request.

    Raises:
        TypeError, ValueError: There is no such option, it is not the caller's to choose, or JSON
            has nothing like its value. No message shows a value: it may be a key.
    """
    from openai.resources.chat.completions import AsyncCompletions

    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a dictionary, got {type(options).__name__}")
    checked = dict(options or {})
    known = inspect.signature(AsyncCompletions.create).parameters
    for name, value in checked.items():
        if name not in known or name in OWN_OPTIONS:
            raise ValueError(
                f"options: there is no {name!r}, or it is not the caller's to choose; what only "
                "this server knows goes into extra_body"
            )
        if name in SECRET_OPTIONS and not (
            isinstance(value, Mapping)
            and all(isinstance(text, str) for pair in value.items() for text in pair)
        ):
            raise TypeError(f"options[{name!r}] must be a dictionary of texts")
        try:
            json.dumps(value, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"options[{name!r}] must be what JSON can hold") from None
    return checked
