"""The console: a page for operators, and the one answer that it asks for again and again.

The page's files are this package's data, read once; they say nothing of the cluster, so they ask for no key. What the
page shows comes from `state`, for a key of scope `admin`; the prompts that it sends are the API's business. It loads
nothing from anywhere else, and its policy keeps the browser to that.
"""

from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath

import msgspec
from aiohttp import web

from splitserve.core.errors import InvalidRequest, PermissionDenied
from splitserve.gateway.backend import Oversight
from splitserve.gateway.console.state import state_of
from splitserve.gateway.endpoints import bearer_of

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HERE = ("same-origin", "none")  # what a browser says of a request by the page itself, or by its address bar
_INDEX = "index.html"


class Console:
    """The routes of one gateway's console."""

    def __init__(self, overseen: Mapping[str, Oversight]) -> None:
        """`overseen`: at least one router, by name."""
        self._overseen = overseen
        self._files = _read()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/console", self.page),
            web.get("/console/", self.without_slash),
            web.get("/console/{file}", self.file),
            web.get("/console/api/state", self.state),
        ]

    async def page(self, http: web.Request) -> web.StreamResponse:
        return self._sent(http, _INDEX)

    async def without_slash(self, http: web.Request) -> web.StreamResponse:
        """The page names its files relative to /console, wherever a proxy has put that."""
        return web.Response(status=308, headers={**_HEADERS, "Location": "../console"})

    async def file(self, http: web.Request) -> web.StreamResponse:
        return self._sent(http, http.match_info["file"])

    async def state(self, http: web.Request) -> web.StreamResponse:
        """The fleet and the newest `requests` of one router, the first unless `router` names one. Another site's page
        may not ask, whatever its user could."""
        if http.headers.get("Sec-Fetch-Site", "none") not in _HERE:
            raise PermissionDenied("the console's figures are for its own page")
        bearer, most = bearer_of(http), _most(http.query.get("requests", "0"))
        name, router = self._router(http.query.get("router", ""))
        told = state_of(await router.fleet(bearer), await router.requests(most, bearer))
        told |= {"asked": name, "routers": list(self._overseen)}
        return web.Response(
            body=msgspec.json.encode(told),
            content_type="application/json",
            headers={**_HEADERS, "Cache-Control": "no-store"},
        )

    def _router(self, said: str) -> tuple[str, Oversight]:
        name = said or next(iter(self._overseen))
        if name not in self._overseen:
            raise InvalidRequest("router", f"{name[:100]!r} is none of {', '.join(self._overseen)}")
        return name, self._overseen[name]

    def _sent(self, http: web.Request, name: str) -> web.Response:
        if name not in self._files:
            raise web.HTTPNotFound
        body, tag = self._files[name]
        headers = {**_HEADERS, "ETag": tag}
        if http.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=_KINDS[PurePath(name).suffix], charset="utf-8", headers=headers)


def _read() -> dict[str, tuple[bytes, str]]:
    """By name, each file and its tag."""
    page = files(__package__).joinpath("page")
    bodies = {each.name: each.read_bytes() for each in page.iterdir() if PurePath(each.name).suffix in _KINDS}
    return {name: (body, f'"{sha256(body).hexdigest()[:32]}"') for name, body in bodies.items()}


def _most(said: str) -> int:
    """How many requests to tell of."""
    if not (said.isascii() and said.isdigit() and len(said) < 6):
        raise InvalidRequest("requests", f"{said[:20]!r} must be a number of requests, up to 1000")
    return int(said)
