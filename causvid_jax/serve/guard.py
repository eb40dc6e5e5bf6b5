"""Check every request before a handler gets it: host, origin, token, rate and size; add headers to the response."""

import asyncio
import collections
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from causvid_jax.serve.protocol import TOKEN_PREFIX
from causvid_jax.serve.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
OPEN = ("/healthz", "/readyz")
"""Paths of probes, without token and rate limit."""
MOST_ADDRESSES = 10_000
BODY_SECONDS = 60.0
"""Time for the body of a request."""


class Guard:
    """ASGI middleware that refuses requests before the application gets them.

    A refusal is a status (401, 403, 413, 429) or, of a WebSocket, a close code of 4000 plus the status, with one
    sentence.

    Args:
        app: the application.
        settings: address, token, origins and limits.
    """

    def __init__(self, app: Any, settings: Settings):
        self.app, self.settings = app, settings
        self._minute, self._counts = 0, collections.Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None and scope["type"] == "websocket":
            await _close(receive, send, *refusal)
        elif refusal is not None:
            status, reason = refusal
            answer = JSONResponse({"error": {"message": reason, "type": "refused"}}, status_code=status)
            await answer(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self.app(scope, _limited(receive, self.settings.upload_bytes), _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the reason if a request is refused, else None."""
        headers, path = Headers(scope=scope), scope["path"]
        if path in OPEN:
            return None
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self.settings.is_local and host not in ("localhost", "127.0.0.1", "::1"):
            return 403, "this server answers to the name localhost only"  # another site's name may resolve to us
        origin = headers.get("origin")
        if origin is not None and origin not in self.settings.origin:
            scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
            proxied = headers.get("x-forwarded-proto", scheme)
            if origin not in (f"{scheme}://{headers.get('host')}", f"{proxied}://{headers.get('host')}"):
                return 403, f"pages of {origin[:100]} may not connect; --origin permits it"
        address = scope["client"][0] if scope.get("client") else ""
        if self._count(address) > self.settings.requests_per_minute:
            return 429, f"more than {self.settings.requests_per_minute} requests a minute; wait a minute"
        protected = path.startswith(("/v1/", "/metrics")) or scope["type"] == "websocket"
        if protected and self.settings.token and not self._has_token(headers):
            return 401, "the token is missing or wrong"
        size = headers.get("content-length", "0")
        if not size.isdigit() or int(size) > self.settings.upload_bytes:
            return 413, f"the request is larger than {self.settings.upload_bytes >> 20} MiB"
        return None

    def _count(self, address: str) -> int:
        minute = int(time.monotonic() // 60)
        if minute != self._minute or len(self._counts) > MOST_ADDRESSES:
            self._minute = minute
            self._counts.clear()
        self._counts[address] += 1
        return self._counts[address]

    def _has_token(self, headers: Headers) -> bool:
        offered = [headers.get("authorization", "").removeprefix("Bearer ")]
        protocols = headers.get("sec-websocket-protocol", "").split(",")
        offered += [word.strip().removeprefix(TOKEN_PREFIX) for word in protocols]
        return any(hmac.compare_digest(word.encode(), self.settings.token.encode()) for word in offered)


async def _close(receive: Receive, send: Send, status: int, reason: str) -> None:
    """Accept a WebSocket and close it at once; otherwise a browser does not get the reason."""
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.close", "code": 4000 + status, "reason": reason[:120]})


def _with_headers(send: Send) -> Send:
    async def sender(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message["headers"]}
            extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *(pair for pair in extra if pair[0] not in present)]}
        await send(message)

    return sender


class TooLarge(Exception):
    """A body without a declared length is larger than accepted."""


class TooSlow(Exception):
    """A body did not arrive within :data:`BODY_SECONDS`."""


def _limited(receive: Receive, most: int) -> Receive:
    total, complete = 0, False
    end = time.monotonic() + BODY_SECONDS

    async def receiver() -> MutableMapping[str, Any]:
        nonlocal total, complete
        if complete:  # the next message is the disconnection, which has no time limit
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
        except TimeoutError:
            raise TooSlow from None
        total += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if total > most:
            raise TooLarge
        return message

    return receiver
