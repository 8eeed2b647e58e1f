"""Bytes that are hardly HTTP: each ends in a typed error (or the right bytes), and the client works afterwards."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from snapshotter.digest import Digest
from snapshotter.errors import SnapshotterError
from snapshotter.registry.reference import Reference
from tests.unit.registry.conftest import Clients

CONTENT = b"0123456789"
DIGEST = Digest.of(CONTENT)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n"
PARTIAL = b"HTTP/1.1 206 Partial Content\r\n"

NASTY = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 20,
    "http09": CONTENT,
    "version": b"HTTP/9.9 200 OK\r\nContent-Length: 10\r\n\r\n" + CONTENT,
    "status": b"HTTP/1.1 20x OK\r\n\r\n",
    "status-large": b"HTTP/1.1 99999 OK\r\n\r\n",
    "status-0": b"HTTP/1.1 000 No\r\n\r\n",
    "informational": b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + OK + b"\r\n" + CONTENT,
    "switching": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + CONTENT,
    "length-negative": b"HTTP/1.1 200 OK\r\nContent-Length: -10\r\n\r\n" + CONTENT,
    "length-word": b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n" + CONTENT,
    "length-twice": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 11\r\n\r\n" + CONTENT,
    "length-huge": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n" + CONTENT,
    "length-and-chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\n012\r\n0\r\n\r\n",
    "chunk-size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "chunk-negative": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    "chunk-huge": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n0123",
    "chunk-unfinished": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n012",
    "transfer-encoding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\n01234\r\n0\r\n\r\n",
    "encoding": OK + b"Content-Encoding: br\r\n\r\n" + CONTENT,
    "headers-many": OK + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n" + CONTENT,
    "header-long": OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n" + CONTENT,
    "header-nul": OK + b"X: \0\r\n\r\n" + CONTENT,
    "header-latin1": OK + b"Content-Type: \xff\xfe\r\n\r\n" + CONTENT,
    "header-without-name": OK + b": x\r\n\r\n" + CONTENT,
    "header-without-colon": OK + b"X\r\n\r\n" + CONTENT,
    "folded": OK + b"X: a\r\n b\r\n\r\n" + CONTENT,
    "no-end-of-headers": OK,
    "until-close": b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT,
    "until-close-long": b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT * 1000,
    "short": OK + b"\r\n0123",
    "long": OK + b"\r\n" + CONTENT * 5,
    "range-foreign": PARTIAL + "Content-Range: bytes ２-５/10\r\nContent-Length: 4\r\n\r\n2345".encode(),
    "range-bytes": PARTIAL + b"Content-Range: bytes \xb2-5/10\r\nContent-Length: 4\r\n\r\n2345",
    "range-length": PARTIAL + b"Content-Range: bytes 2-5/10\r\nContent-Length: 5\r\n\r\n23456",
    "redirect-nowhere": b"HTTP/1.1 307 T\r\nContent-Length: 0\r\n\r\n",
    "redirect-bad": b"HTTP/1.1 307 T\r\nLocation: http://\xff/\r\nContent-Length: 0\r\n\r\n",
    "redirect-percent": b"HTTP/1.1 307 T\r\nLocation: http://%00/\r\nContent-Length: 0\r\n\r\n",
    "redirect-idna": b"HTTP/1.1 307 T\r\nLocation: http://xn--a-/\r\nContent-Length: 0\r\n\r\n",
    "redirect-label": b"HTTP/1.1 307 T\r\nLocation: http://" + b"a" * 300 + b"/\r\nContent-Length: 0\r\n\r\n",
    "challenge-bad": b"HTTP/1.1 401 U\r\nWWW-Authenticate: \xff\xff\r\nContent-Length: 0\r\n\r\n",
    "challenge-realm": b'HTTP/1.1 401 U\r\nWWW-Authenticate: Bearer realm="http://%00/"\r\nContent-Length: 0\r\n\r\n',
    "retry-after": b"HTTP/1.1 503 U\r\nRetry-After: \xff\r\nContent-Length: 0\r\n\r\n",
    "digest": OK + b"Docker-Content-Digest: sha256:\xff\r\n\r\n" + CONTENT,
}


@asynccontextmanager
async def server(answer: Callable[[], bytes]) -> AsyncIterator[str]:
    """Sends the same bytes to everybody and closes; yields host:port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer())
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("name", NASTY)
async def test_hardly_http(clients: Clients, name: str) -> None:
    current = NASTY[name]
    async with server(lambda: current) as address:
        client = await clients.make(retries=1, progress_timeout_seconds=5.0)
        image = Reference.parse(f"{address}/team/app:1")
        with suppress(SnapshotterError):
            assert await client.read_range(image, DIGEST, 2, 4, 10) == CONTENT[2:6]
        with suppress(SnapshotterError):
            assert await client.blob(image, DIGEST, 10, 10) == CONTENT
        with suppress(SnapshotterError):
            await client.manifest(image)
        with suppress(SnapshotterError):
            await client.put_manifest(image, b"{}", "application/json")
        with suppress(SnapshotterError):
            await client.upload_blob(image, Digest.of(b""), 0, lambda: _nothing())
        current = OK + b"\r\n" + CONTENT
        assert await client.blob(image, DIGEST, 10, 10) == CONTENT


async def _nothing() -> AsyncIterator[bytes]:
    for piece in ():
        yield piece
