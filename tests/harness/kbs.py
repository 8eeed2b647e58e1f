"""A development KBS with its keys, and somebody in between who delays, refuses and changes what passes."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import web

from snapshotter.kbs_dev.appraisal import Policy
from snapshotter.kbs_dev.server import KbsDev


def put(directory: Path, name: str, content: bytes) -> Path:
    """Make `content` the resource kbs:///name."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Between:
    """Forwards to a KBS. `before` may answer instead of it; `asked` and `after` may change the bodies that pass."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.before: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
        self.after: Callable[[str, bytes], bytes] | None = None
        self.asked: Callable[[str, bytes], bytes] | None = None
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.url = ""
        self.stopping = asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping.set()
        await self._runner.cleanup()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.path.removeprefix("/kbs/v0/"))
        body = await request.read()
        self.bodies.append(body)
        if self.before and (answer := await self.before(request)) is not None:
            return answer
        if self.asked:
            body = self.asked(request.path.removeprefix("/kbs/v0/"), body)
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.request(request.method, self.upstream + request.path, data=body, headers=headers) as found,
        ):
            content = await found.read()
            status, cookies = found.status, found.headers.getall("Set-Cookie", [])
        if self.after:
            content = self.after(request.path.removeprefix("/kbs/v0/"), content)
        answer = web.Response(status=status, body=content, content_type="application/json")
        for cookie in cookies:
            answer.headers.add("Set-Cookie", cookie)
        return answer

    async def hang(self, _: web.Request) -> web.StreamResponse:
        """For `before`: no answer until the end."""
        await self.stopping.wait()
        return web.Response(status=500)


def times(count: int, status: int, *, path: str = "", body: Any = None) -> Any:
    """For `before`: the first `count` requests (whose path contains `path`) get `status`."""
    left = [count]

    async def before(request: web.Request) -> web.StreamResponse | None:
        if path in request.path and left[0] > 0:
            left[0] -= 1
            return web.json_response(body or {"detail": "canary"}, status=status)
        return None

    return before


async def kbs_dev(directory: Path, *, allow_sample: bool = True, **more: Any) -> KbsDev:
    """One that listens on a free port."""
    expect = more.pop("expect", {})
    return await KbsDev(directory, Policy(allow_sample, expect), **more).start("127.0.0.1", 0)
