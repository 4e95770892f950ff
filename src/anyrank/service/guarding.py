"""What stands before every page: names, methods, a token, and headers that tell a browser to trust nothing else."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PARAMETER = "token"
_METHODS = ("GET", "HEAD")
_MOST_QUERY = 4096  # bytes
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Guard:
    """Lets a request through to `app` if its method, its host and, where there is one, its token are right.

    `names`: the host names that the service answers to, beside `localhost` and plain addresses. An attack by DNS rebinding
    arrives under a name of the attacker. `token`: what a request must show, as `?token=`, which is answered by a cookie and the
    address without it, by that cookie, or as `Authorization: Bearer`; empty: none.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str] = (), token: str = "") -> None:
        self._app = app
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}
        self._token = token
        self._secret = hmac.digest(token.encode(), b"cookie", "sha256").hex()  # a cookie that leaks is not the token
        self._cookie = f"anyrank_{hashlib.sha256(self._secret.encode()).hexdigest()[:8]}"  # cookies do not keep ports apart

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no other protocol is spoken here
        answer = self._refusal(scope)
        await (answer or self._app)(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that is not let through; `None` for one that is."""
        if scope["method"] not in _METHODS:
            return _plain(405, "read only: GET and HEAD alone are answered", {"allow": ", ".join(_METHODS)})
        if not self._is_known(Headers(scope=scope).getlist("host")):
            return _plain(421, "this host name is not known here: start the service with --name HOST to answer to it")
        if not self._token or scope["path"] == "/health":
            return None
        return self._without_token(scope)

    def _is_known(self, hosts: list[str]) -> bool:
        if len(hosts) != 1:
            return False
        host = hosts[0].strip()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        return name.lower().rstrip(".") in self._names or _is_address(name)

    def _without_token(self, scope: Scope) -> Response | None:
        headers, query = Headers(scope=scope), scope["query_string"]
        if len(query) > _MOST_QUERY:
            return _plain(414, "the address is too long")
        words = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
        shown = [value for key, value in words if key == _PARAMETER]
        if shown:
            return self._admitted(scope, words) if _same(shown[0], self._token) else _plain(401, _WRONG)
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        by_header = kind.lower() == "bearer" and _same(bearer.strip(), self._token)
        if by_header or _same(self._shown_cookie(headers), self._secret):
            return None
        return _plain(401, _WRONG, {"www-authenticate": 'Bearer realm="anyrank"'})

    def _admitted(self, scope: Scope, words: list[tuple[str, str]]) -> Response:
        """The same address without the token, which the cookie stands for from now on."""
        last = scope["path"].rpartition("/")[2]  # relative: what a proxy puts before it is not known here
        rest = urlencode([(key, value) for key, value in words if key != _PARAMETER])
        answer = RedirectResponse(f"./{quote(last)}" + (f"?{rest}" if rest else ""), status_code=303)
        answer.set_cookie(self._cookie, self._secret, httponly=True, samesite="lax", path="/")
        return answer

    def _shown_cookie(self, headers: Headers) -> str:
        jar: SimpleCookie = SimpleCookie()
        try:
            jar.load(headers.get("cookie", "")[:_MOST_QUERY])
        except CookieError:
            return ""
        return jar[self._cookie].value if self._cookie in jar else ""


_WRONG = "a token is needed: open the address with ?token=..., or send it as Authorization: Bearer ..."


def _same(shown: str, expected: str) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), expected.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _plain(status: int, line: str, headers: dict[str, str] | None = None) -> Response:
    return PlainTextResponse(f"{status}: {line}\n", status_code=status, headers=headers)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
