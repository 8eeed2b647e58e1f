"""A Confidential Data Hub with one resource, on its ttrpc socket and on the loopback port of api-server-rest.

python -m tests.harness.cdh SOCKET NAME FILE      prints the URL of the port; kbs:///NAME is the content of FILE
"""

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Self

from aiohttp import web

from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import KeyDenied
from snapshotter.keys.packet import Packet
from tests.harness.ttrpc import TtrpcServer, field, first_field


class Hub:
    """Hands out kbs:///`name`, and opens packets with it. `reply` replaces its answer to UnWrapKey."""

    def __init__(self, path: Path, name: str, resource: bytes) -> None:
        self._uri = f"kbs:///{name}"
        self.resource = resource
        self.reply: bytes | None = None
        self.server = TtrpcServer(
            path,
            {
                ("api.GetResourceService", "GetResource"): self.get,
                ("keyprovider.KeyProviderService", "UnWrapKey"): self.unwrap,
            },
        )

    async def get(self, request: bytes) -> tuple[int, bytes]:
        if first_field(request, 1).decode() != self._uri:
            return 13, b"[CDH] [ERROR]: canary"
        return 0, field(1, self.resource)

    async def unwrap(self, request: bytes) -> tuple[int, bytes]:
        if self.reply is not None:
            return 0, field(1, self.reply)
        asked = json.loads(first_field(request, 1))
        assert asked["op"] == "keyunwrap"
        found = Packet.parse(base64.b64decode(asked["keyunwrapparams"]["annotation"]))
        try:
            options = found.open(SecretBytes(self.resource)).expose()
        except KeyDenied:
            return 13, b"[CDH] [ERROR]: canary"
        return 0, field(1, json.dumps({"keyunwrapresults": {"optsdata": list(options)}}).encode())


class Rest:
    """api-server-rest with feature resource: the same answer to every path, or none while `silent` is set."""

    def __init__(self, body: bytes) -> None:
        self.status = 200
        self.body = body
        self.silent: asyncio.Event | None = None
        self.paths: list[str] = []
        self.url = ""
        app = web.Application()
        app.router.add_get("/{path:.*}", self._get)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.silent:
            self.silent.set()
        await self._runner.cleanup()

    async def _get(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        if self.silent:
            await self.silent.wait()
        return web.Response(status=self.status, body=self.body)


async def _serve(socket: Path, name: str, resource: bytes) -> None:
    async with Hub(socket, name, resource).server, Rest(resource) as rest:
        print(rest.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_bytes()))
