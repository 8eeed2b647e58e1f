"""A registry that misbehaves on demand: a real HTTP server on loopback, and one fault per request where a test says so.

    async with SimRegistry() as registry:
        digest = registry.add_blob(b"…")
        registry.fail(cut(after=10), on="blobs")        # the next request for a blob only
        registry.fail(status(503), on="token", times=3)

`/cdn/<digest>` of any SimRegistry serves the same blobs without authentication: another instance plays the object store
that redirects lead to. Every request is kept in `seen`.
"""

import asyncio
import base64
import hashlib
import json
import re
import secrets
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self
from weakref import WeakSet

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True)
class Seen:
    """One request. `kind`: blobs, manifests, uploads, token, cdn."""

    kind: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def authorization(self) -> str | None:
        return self.headers.get("Authorization")


@dataclass
class _Planned:
    fault: Fault
    on: str
    times: int


@dataclass
class Auth:
    """What the registry demands. `scheme`: "" (nothing), "basic" or "bearer"."""

    scheme: str = ""
    username: str = ""
    password: str = ""
    refresh_token: str = ""
    realm: str = ""  # default: this server's own /token
    expires_in: int | None = 300
    generous: bool = False  # the token server gives everybody a token; those of others open nothing
    tokens: set[str] = field(default_factory=set)  # valid now


class SimRegistry:
    """Repositories share one blob store."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.auth = Auth()
        self.seen: list[Seen] = []
        self.redirect: Callable[[str], str] | None = None  # digest → Location of blob reads
        self.address = ""
        self.origin = ""
        self._tls = tls
        self._planned: list[_Planned] = []
        self._uploads: set[str] = set()
        self._handlers: WeakSet[asyncio.Task[object]] = WeakSet()
        self.arrived = asyncio.Event()  # set by the first request
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/token", self._entry("token", self._token))
        app.router.add_post("/token", self._entry("token", self._token))
        app.router.add_get("/cdn/{digest}", self._entry("cdn", self._blob))
        repository = "/v2/{repository:.+}"
        app.router.add_post(f"{repository}/blobs/uploads/", self._entry("uploads", self._guarded(self._start_upload)))
        app.router.add_put(f"{repository}/blobs/uploads/{{id}}", self._entry("uploads", self._guarded(self._upload)))
        app.router.add_get(
            f"{repository}/blobs/{{digest}}", self._entry("blobs", self._guarded(self._blob_or_redirect))
        )
        app.router.add_get(f"{repository}/manifests/{{name}}", self._entry("manifests", self._guarded(self._manifest)))
        app.router.add_put(f"{repository}/manifests/{{name}}", self._entry("manifests", self._guarded(self._put)))
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=0, handler_cancellation=True
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        port = self._runner.addresses[0][1]
        self.address = f"127.0.0.1:{port}"
        self.origin = f"{'https' if self._tls else 'http'}://{self.address}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._handlers:
            task.cancel()  # one that has stopped reading does not notice that its client is gone
        assert self._runner is not None
        await self._runner.cleanup()

    # content and faults

    def add_blob(self, content: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blobs[digest] = content
        return digest

    def add_manifest(self, repository: str, tag: str, raw: bytes, media_type: str) -> str:
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        self.manifests[repository, tag] = self.manifests[repository, digest] = (raw, media_type)
        return digest

    def fail(self, fault: Fault, *, on: str, times: int = 1) -> None:
        """Answer the next `times` requests of a kind by `fault`; faults queue up."""
        self._planned.append(_Planned(fault, on, times))

    def kinds(self) -> list[str]:
        return [seen.kind for seen in self.seen]

    def of(self, kind: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.kind == kind]

    def _entry(self, kind: str, handler: Handler) -> Handler:
        async def entry(request: web.Request) -> web.StreamResponse:
            body = await request.read() if kind == "token" else b""
            self.seen.append(Seen(kind, request.method, request.path_qs, dict(request.headers), body))
            self.arrived.set()
            if task := asyncio.current_task():
                self._handlers.add(task)
            for planned in self._planned:
                if planned.on == kind and planned.times > 0:
                    planned.times -= 1
                    return await planned.fault(request, handler)
            return await handler(request)

        return entry

    # authentication

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            sent = request.headers.get("Authorization", "")
            if self.auth.scheme == "basic":
                pair = f"{self.auth.username}:{self.auth.password}".encode()
                if sent != "Basic " + base64.b64encode(pair).decode():
                    return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="sim"'})
            if self.auth.scheme == "bearer" and sent.removeprefix("Bearer ") not in self.auth.tokens:
                return web.Response(status=401, headers={"WWW-Authenticate": self._challenge(request)})
            return await handler(request)

        return guarded

    def _challenge(self, request: web.Request) -> str:
        realm = self.auth.realm or f"{self.origin}/token"
        actions = "pull" if request.method in ("GET", "HEAD") else "pull,push"
        scope = f"repository:{request.match_info['repository']}:{actions}"
        return f'Bearer realm="{realm}",service="sim",scope="{scope}",error="invalid_token"'

    async def _token(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            form = await request.post()
            allowed = form.get("grant_type") == "refresh_token" and form.get("refresh_token") == self.auth.refresh_token
        elif self.auth.username:
            pair = f"{self.auth.username}:{self.auth.password}".encode()
            allowed = request.headers.get("Authorization") == "Basic " + base64.b64encode(pair).decode()
        else:
            allowed = "Authorization" not in request.headers
        if not allowed and not self.auth.generous:
            return web.Response(status=401)
        token = secrets.token_urlsafe(16)
        if allowed:
            self.auth.tokens.add(token)
        answer: dict[str, object] = {"token": token}
        if self.auth.expires_in is not None:
            answer["expires_in"] = self.auth.expires_in
        return web.json_response(answer)

    # the API

    async def _manifest(self, request: web.Request) -> web.Response:
        found = self.manifests.get((request.match_info["repository"], request.match_info["name"]))
        if found is None:
            return web.json_response({"errors": [{"code": "MANIFEST_UNKNOWN"}]}, status=404)
        raw, media_type = found
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        return web.Response(body=raw, headers={"Content-Type": media_type, "Docker-Content-Digest": digest})

    async def _put(self, request: web.Request) -> web.Response:
        raw = await request.read()
        repository, name = request.match_info["repository"], request.match_info["name"]
        digest = self.add_manifest(repository, name, raw, request.headers["Content-Type"])
        return web.Response(status=201, headers={"Docker-Content-Digest": digest})

    async def _blob_or_redirect(self, request: web.Request) -> web.StreamResponse:
        if self.redirect is not None and request.method == "GET":
            location = self.redirect(request.match_info["digest"])
            return web.Response(status=307, headers={"Location": location}, text="<a>Temporary Redirect</a>")
        return await self._blob(request)

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        content = self.blobs.get(request.match_info["digest"])
        if content is None:
            return web.json_response({"errors": [{"code": "BLOB_UNKNOWN"}]}, status=404)
        wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
        if wanted is None:
            return web.Response(body=content, content_type="application/octet-stream")
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        if first >= len(content):
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        headers = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return web.Response(status=206, body=content[first : last + 1], headers=headers)

    async def _start_upload(self, request: web.Request) -> web.Response:
        name = secrets.token_hex(8)
        self._uploads.add(name)
        return web.Response(status=202, headers={"Location": f"{request.path}{name}?_state=a%2Fb%3D"})

    async def _upload(self, request: web.Request) -> web.Response:
        if request.match_info["id"] not in self._uploads or request.query.get("_state") != "a/b=":
            return web.Response(status=404)
        digest = self.add_blob(await request.read())
        if digest != request.query["digest"]:
            del self.blobs[digest]
            return web.Response(status=400)
        self._uploads.discard(request.match_info["id"])
        return web.Response(status=201, headers={"Docker-Content-Digest": digest})


# faults


def status(code: int, **headers: str) -> Fault:
    """Answer `code`; header names are written with underscores."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        return web.Response(status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return fault


def changed(change: Callable[[web.Response], object]) -> Fault:
    """Let `change` edit the right answer."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        assert isinstance(response, web.Response)
        change(response)
        return response

    return fault


def header(name: str, value: str) -> Fault:
    """The right answer with one header replaced."""

    def change(response: web.Response) -> None:
        response.headers[name] = value

    return changed(change)


def flipped(offset: int) -> Fault:
    """The right answer with one byte inverted."""

    def change(response: web.Response) -> None:
        assert isinstance(response.body, bytes)
        body = bytearray(response.body)
        body[offset] ^= 0xFF
        response.body = bytes(body)

    return changed(change)


def ignores_range() -> Fault:
    """200 and the whole blob."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name != "Range"}
        return await handler(request.clone(headers=headers))

    return fault


def _partial(after: int, then: Callable[[web.Request], Awaitable[None]]) -> Fault:
    """The head of the right answer, `after` bytes of its body, then `then`."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        right = await handler(request)
        assert isinstance(right, web.Response)
        assert isinstance(right.body, bytes)
        response = web.StreamResponse(status=right.status, headers=right.headers)
        response.content_length = len(right.body)
        await response.prepare(request)
        await response.write(right.body[:after])
        await then(request)
        return response

    return fault


def cut(after: int) -> Fault:
    """Close the connection in the middle of the body."""

    async def then(request: web.Request) -> None:
        assert request.transport is not None
        request.transport.close()

    return _partial(after, then)


def stalls(after: int) -> Fault:
    """Say nothing more after some bytes of the body, until the client gives up."""

    async def then(_: web.Request) -> None:
        await client_gives_up()

    return _partial(after, then)


def body_short(code: int, *, announced: int, sent: int) -> Fault:
    """An answer whose body is shorter than its Content-Length, on a connection that stays open."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = web.StreamResponse(status=code, headers={"Content-Length": str(announced)})
        await response.prepare(request)
        await response.write(b"x" * sent)
        await client_gives_up()
        return response

    return fault


def hangs_up() -> Fault:
    """Close the connection instead of answering."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response(status=500)

    return fault


def silent() -> Fault:
    """Never answer."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        await client_gives_up()
        return web.Response(status=500)

    return fault


def endless(code: int = 200, **headers: str) -> Fault:
    """A chunked body without end."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = web.StreamResponse(
            status=code, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        response.enable_chunked_encoding()
        await response.prepare(request)
        while not _is_gone(request):
            try:
                await response.write(bytes(64 << 10))
            except OSError:
                break
        return response

    return fault


def _is_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


async def client_gives_up() -> None:
    """The server cancels a handler whose client has gone."""
    await asyncio.Event().wait()


def docker_config(address: str, username: str, password: str) -> str:
    """Text of a docker config.json for one registry."""
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    return json.dumps({"auths": {address: {"auth": auth}}})


class FakeClock:
    """Time that passes only when somebody sleeps; every sleep is kept. Jitter is at its most."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000.0 + self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def jitter(self) -> float:
        return 1.0
