"""Who may ask, what may be sent, and what the browser may load: around the page and the JSON interface alike."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import math
from typing import Any
from urllib.parse import urlsplit

# The browser loads nothing from other hosts, whatever a page says. Gradio's page has inline scripts and styles.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
LONGEST_LINE = 1000  # characters
MOST_SENT = 2**20  # bytes of a body
MOST_UPLOADED = 4 * 2**30  # bytes of an uploaded file
_TAKE_FILES = ("/uploads", "/gradio_api/upload")
# The routes of Gradio's interface that its page uses. The others are refused: they run events in other ways, fetch
# addresses and convert recordings.
_GRADIO = "/gradio_api/"
_ASKED = ("queue/join", "queue/data", "cancel", "reset", "upload", "upload_progress")
_ASKED_BELOW = ("heartbeat/", "file=")


class Refused(Exception):
    """A request is refused. `status` and `line` are those of the answer."""

    def __init__(self, status: int, line: str):
        self.status, self.line = status, line
        super().__init__(line)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application that checks all requests to another one.

    It asks for the password; refuses requests that other web sites send through the user's browser, bodies that are
    too long or not JSON, and routes of Gradio that the page does not use; and forbids the browser to load anything
    from elsewhere.

    Args:
        app: the application.
        auth: "USER:PASSWORD", or None for no password.
        local: whether it serves this machine alone; then host names other than loopback ones are refused, since a web
            site could have pointed its own name here.
    """

    def __init__(self, app: Any, auth: str | None, local: bool):
        self._app, self._local = app, local
        self._auth = auth and "Basic " + base64.b64encode(auth.encode()).decode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_sender(scope, headers)
            _check_path(scope["path"])
            receive = await _checked_body(scope, headers, receive)
        except Refused as refused:
            if scope["type"] == "http":
                return await _refuse(send, refused)
            return await send({"type": "websocket.close", "code": 1008})

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        await self._app(scope, receive, send_guarded)

    def _check_sender(self, scope: Any, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self._local and not is_loopback(_split(f"//{host}").hostname or ""):
            raise Refused(403, f"{host} is no name of this machine")
        origin = headers.get("origin")
        if origin and scope.get("method") not in ("GET", "HEAD") and _split(origin).netloc != host:
            raise Refused(403, "another web site sent this")
        given = headers.get("authorization", "")
        if self._auth and not hmac.compare_digest(given.encode(), self._auth.encode()):
            raise Refused(401, "give user and password")


def told(line: str) -> dict[str, str]:
    """An error as a JSON answer: one line of limited length, whatever it repeats of the request."""
    return {"error": " ".join(line.split())[:LONGEST_LINE]}


def parsed(body: bytes) -> Any:
    """The value of JSON that can be written again: no number that is not finite, no half of a surrogate pair.

    Raises ValueError for anything else, also for JSON that is nested too deep.
    """
    try:
        value = json.loads(body, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return float(text)


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def _split(address: str) -> Any:
    try:
        return urlsplit(address)
    except ValueError:
        raise Refused(400, f"{address} is no address") from None


def _check_path(path: str) -> None:
    before, found, asked = path.partition(_GRADIO)
    if found and (before or asked not in _ASKED and not asked.startswith(_ASKED_BELOW)):
        raise Refused(404, f"there is no {path}")


async def _checked_body(scope: Any, headers: dict[str, str], receive: Any) -> Any:
    """The `receive` that hands the body to the application. Raises Refused for a body that it must not get."""
    if "transfer-encoding" in headers:
        raise Refused(411, "of no stated length")
    try:
        length = int(headers.get("content-length", "0"))
    except ValueError:
        raise Refused(400, "content-length: not a number of bytes") from None
    takes_files = scope["path"] in _TAKE_FILES
    most = MOST_UPLOADED if takes_files else MOST_SENT
    if length > most:
        raise Refused(413, f"too large, at most {most} bytes are taken")
    if takes_files or not length:
        return receive
    if headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refused(400, "send JSON, as application/json")
    body, message = b"", {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    try:
        parsed(body)
    except ValueError as error:
        raise Refused(400, f"not JSON ({error})") from error
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return left.pop() if left else await receive()

    return again


async def _refuse(send: Any, refused: Refused) -> None:
    body = json.dumps(told(refused.line)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="wan", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
