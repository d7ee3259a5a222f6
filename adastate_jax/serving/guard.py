"""What every request passes: the door, the size of what it brings, and the headers of what it gets."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adastate_jax.serving.limits import Door

_MOST_JSON = 16 * 1024
_OPEN = ("/", "/healthz", "/readyz", "/docs", "/v1/model")  # without the server's token
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Checks requests.

    Args:
        door: who is let in.
        most_picture: bytes of an upload.
    """

    def __init__(self, door: Door, most_picture: int):
        self._door, self._most_picture = door, most_picture

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Around an application."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] not in ("http", "websocket"):
                await app(scope, receive, send)
                return
            status, reason = self._refusal(scope)
            if reason is None:
                await app(scope, receive, _with_headers(send))
            elif scope["type"] == "http":
                await JSONResponse({"detail": reason}, status)(scope, receive, _with_headers(send))
            else:
                await receive()  # the connection's opening
                await send({"type": "websocket.close", "code": 1008, "reason": reason})

        return guarded

    def _refusal(self, scope: Scope) -> tuple[int, str | None]:
        headers = Headers(scope=scope)
        path = scope["path"]
        # A session's own paths have its keys.
        guarded = not (path in _OPEN or path.startswith(("/page/", "/v1/sessions/")))
        origin, authorization = headers.get("origin"), headers.get("authorization")
        reason = self._door.refusal(headers.get("host", ""), origin, authorization, guarded)
        if reason:
            return 403, reason
        if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            most = self._most_picture if path.endswith("/picture") else _MOST_JSON
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return 411, "say how long the body is"
            if int(length[:20]) > most:
                return 413, f"the body is longer than {most} bytes"
        return 200, None


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
