"""A ttrpc server, written on its own from the wire format: for what speaks to services of a confidential guest."""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

Handler = Callable[[bytes], Awaitable[tuple[int, bytes]]]  # payload → status code, payload or message


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def first_field(message: bytes, wanted: int) -> bytes:
    """Of a message that has only length-delimited fields and numbers below 2^63."""
    at = 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value += (byte % 128) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        size = number()
        if key % 8 == 2:
            at += size
            if key // 8 == wanted:
                return message[at - size : at]
    return b""


class TtrpcServer:
    """Answers (service, method) pairs; others with UNIMPLEMENTED. `raw` replaces every answer by these bytes."""

    def __init__(self, path: Path, handlers: dict[tuple[str, str], Handler]) -> None:
        self.path = path
        self.handlers = handlers
        self.raw: bytes | None = None
        self.silent = False
        self.calls: list[str] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            length, stream, kind, flags = struct.unpack(">IIBB", await reader.readexactly(10))
            request = await reader.readexactly(length)
            assert (stream % 2, kind, flags) == (1, 1, 0)
            service, method = first_field(request, 1).decode(), first_field(request, 2).decode()
            self.calls.append(method)
            if self.silent:
                await reader.read()
                return
            writer.write(self.raw if self.raw is not None else await self._answer(service, method, request, stream))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, service: str, method: str, request: bytes, stream: int) -> bytes:
        handler = self.handlers.get((service, method))
        code, content = await handler(first_field(request, 3)) if handler else (12, b"unknown method")
        status = varint(1 << 3) + varint(code) + field(2, content)
        body = field(1, status) if code else field(2, content)
        return struct.pack(">IIBB", len(body), stream, 2, 0) + body
