"""Who may ask, and what the browser may load: around the page and the JSON interface alike."""

from __future__ import annotations

import base64
import hmac
import ipaddress
from typing import Any
from urllib.parse import urlsplit

# Nothing comes from elsewhere, whatever a page says. Gradio's own page has scripts and styles in it.
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


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application around another.

    It asks for the password, refuses what other web sites send through the user's browser, and forbids the browser to
    load anything from elsewhere.

    Args:
        app: the application.
        auth: "USER:PASSWORD", or None for no password.
        local: whether it is served to this machine alone; other names of it are refused then, which a web site could
            have pointed here.
    """

    def __init__(self, app: Any, auth: str | None, local: bool):
        self._app, self._local = app, local
        self._auth = auth and "Basic " + base64.b64encode(auth.encode()).decode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal and scope["type"] == "http":
            return await _refuse(send, *refusal)
        if refusal:
            return await send({"type": "websocket.close", "code": 1008})

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        await self._app(scope, receive, send_guarded)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and the line of a refusal, or None."""
        host = headers.get("host", "")
        if self._local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return 403, f"{host} is no name of this machine"
        origin = headers.get("origin")
        if origin and scope.get("method") not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            return 403, "another web site sent this"
        given = headers.get("authorization", "")
        if self._auth and not hmac.compare_digest(given.encode(), self._auth.encode()):
            return 401, "give user and password"
        return None


async def _refuse(send: Any, status: int, line: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="wan", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": line.encode()})
