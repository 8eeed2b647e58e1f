"""A unary ttrpc call, as the services inside a confidential guest speak it (ttrpc PROTOCOL.md).

    u32 length | u32 stream | u8 type (1 request, 2 response) | u8 flags        big-endian, then `length` bytes:
    Request  { string service=1; string method=2; bytes payload=3; int64 timeout_nano=4 }
    Response { Status status=1 { int32 code=1; string message=2 }; bytes payload=2 }

The handful of protobuf messages that travel in it have only fields of lengths and numbers, so they are written here by
hand. Every call has its own connection: calls are rare, and one that fails leaves nothing behind.
"""

import asyncio
import struct
from collections.abc import Mapping
from typing import Final, TypeAlias

from snapshotter.errors import KeyDenied, MalformedImage, Unavailable

HEADER: Final = struct.Struct(">IIBB")
REQUEST, RESPONSE = 1, 2
MESSAGE_BYTES: Final = 4 << 20
TIMEOUT_SECONDS: Final = 50.0  # what the clients of these services use
_STREAM = 1  # clients use odd numbers
_WHAT = "ttrpc"
_CODES: Final = {4: "DEADLINE_EXCEEDED", 5: "NOT_FOUND", 7: "PERMISSION_DENIED", 12: "UNIMPLEMENTED", 13: "INTERNAL", 14: "UNAVAILABLE", 16: "UNAUTHENTICATED"}  # fmt: skip  # noqa: E501
UNIMPLEMENTED: Final = 12
_PASSING: Final = (4, 14)

Fields: TypeAlias = Mapping[int, list[bytes | int]]


class Refused(KeyDenied):
    """The service answered with an error status. Its words are not repeated: they may quote a secret."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what}: {_CODES.get(code, f'status {code}')}")
        self.code = code


class Client:
    """Calls services behind one Unix socket."""

    def __init__(self, path: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._path = path
        self._timeout_seconds = timeout_seconds

    async def call(self, service: str, method: str, payload: bytes) -> bytes:
        """The payload of the answer.

        Raises Unavailable when nobody answers in time, Refused for an error status, KeyDenied for what is not ttrpc.
        """
        what = f"{self._path}: {method}"
        try:
            async with asyncio.timeout(self._timeout_seconds):
                answer = await self._exchange(encode_request(service, method, payload, self._timeout_seconds))
                code, content = decode_response(answer)
        except TimeoutError:
            raise Unavailable(f"{what}: no answer within {self._timeout_seconds:.0f} s") from None
        except asyncio.IncompleteReadError:
            raise Unavailable(f"{what}: connection closed") from None
        except OSError as error:
            raise Unavailable(f"{what}: {error.strerror or 'cannot connect'}") from None
        except MalformedImage as error:
            raise KeyDenied(f"{what}: {error}") from None
        if code in _PASSING:
            raise Unavailable(f"{what}: {_CODES[code]}")
        if code:
            raise Refused(what, code)
        return content

    async def _exchange(self, frame: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(frame)
            await writer.drain()
            length, stream, kind, _ = HEADER.unpack(await reader.readexactly(HEADER.size))
            if length > MESSAGE_BYTES or stream != _STREAM or kind != RESPONSE:
                raise MalformedImage(f"{_WHAT}: not the response to this request, or longer than {MESSAGE_BYTES} bytes")
            return await reader.readexactly(length)
        finally:
            writer.transport.abort()


def encode_request(service: str, method: str, payload: bytes, timeout_seconds: float = 0.0) -> bytes:
    """A whole frame; `timeout_seconds` 0 = not said."""
    body = text_field(1, service) + text_field(2, method) + bytes_field(3, payload)
    if timeout_seconds:
        body += _varint(4 << 3) + _varint(int(timeout_seconds * 1e9))
    if len(body) > MESSAGE_BYTES:
        raise KeyDenied(f"{_WHAT}: request longer than {MESSAGE_BYTES} bytes")
    return HEADER.pack(len(body), _STREAM, REQUEST, 0) + body


def decode_response(body: bytes) -> tuple[int, bytes]:
    """Status code (0: done) and payload. Raises MalformedImage."""
    answer = parse(body)
    status = parse(last_bytes(answer, 1))
    code = (status.get(1) or [0])[-1]
    if not isinstance(code, int):
        raise MalformedImage(f"{_WHAT}: status code is not a number")
    return code, last_bytes(answer, 2)


def bytes_field(number: int, value: bytes) -> bytes:
    """A protobuf field of bytes, a string, or a message; "" when empty, which is how proto3 writes a default."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value if value else b""


def text_field(number: int, value: str) -> bytes:
    return bytes_field(number, value.encode())


def parse(message: bytes) -> Fields:
    """All fields of a protobuf message by number: bytes, or integers. Raises MalformedImage."""
    found: dict[int, list[bytes | int]] = {}
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        number, kind = key >> 3, key & 7
        value: bytes | int
        if kind == 0:
            value, at = _read_varint(message, at)
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                size, at = _read_varint(message, at)
            value = message[at : at + size]
            at += size
        else:
            raise MalformedImage("protobuf: a field of no known type")
        if at > len(message) or not number:
            raise MalformedImage("protobuf: cut short")
        found.setdefault(number, []).append(value)
    return found


def last_bytes(fields: Fields, number: int) -> bytes:
    """A field of bytes, b"" if absent; of several the last counts."""
    value = (fields.get(number) or [b""])[-1]
    if not isinstance(value, bytes):
        raise MalformedImage(f"protobuf: field {number} is not bytes")
    return value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise MalformedImage("protobuf: not a number")
