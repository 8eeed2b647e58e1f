"""What we tell the kernel, and what we refuse to believe of a request."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidArgument
from snapshotter.ondemand import wire

EVERYTHING = (1 << 64) - 1


def init(minor: int = 45, flags: int = EVERYTHING, major: int = 7) -> wire.Init:
    low, high = flags & 0xFFFFFFFF, flags >> 32
    return wire.Init.parse(struct.pack("<IIIII", major, minor, 131072, low, high) + bytes(44))


def out_fields(body: bytes) -> tuple[int, ...]:
    """struct fuse_init_out: … max_background, congestion_threshold, max_write, time_gran, max_pages, …"""
    return struct.unpack("<IIIIHHIIHHI28x", body)


def test_init_asks_for_room_for_thousands_of_waiting_reads() -> None:
    flags, body = wire.negotiate(init(), async_dio=True)
    major, minor, read_ahead, low, background, congestion, _, _, pages, _, high = out_fields(body)
    assert (major, minor, read_ahead) == (7, 45, 131072)
    assert background >= 4096
    assert congestion >= 3000
    assert pages == 256
    assert flags == low | high << 32
    assert flags & wire.HAS_RESEND
    assert flags & wire.ASYNC_DIO


def test_init_never_takes_what_was_not_offered() -> None:
    flags, body = wire.negotiate(init(minor=33, flags=wire.ASYNC_READ | wire.MAX_PAGES), async_dio=True)
    assert flags == wire.ASYNC_READ | wire.MAX_PAGES
    assert out_fields(body)[1] == 33


def test_passthrough_and_write_back_are_never_negotiated() -> None:
    flags, _ = wire.negotiate(init(), async_dio=True)
    assert not flags & (1 << 37 | 1 << 16)
    assert not wire.negotiate(init(), async_dio=False)[0] & wire.ASYNC_DIO


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (7, 30), (6, 45)])
def test_another_protocol_is_refused(major: int, minor: int) -> None:
    with pytest.raises(InvalidArgument):
        wire.negotiate(init(major=major, minor=minor), async_dio=True)


@pytest.mark.parametrize(
    ("release", "safe"),
    [
        ("6.1.0-50-amd64", True), ("6.11.9", True), ("6.12.0", False), ("6.12.71-generic", False), ("6.12.72", True),
        ("6.13.0", False), ("6.17.3", False), ("6.18.10", False), ("6.18.11", True), ("6.18.44-fc-v669", True),
        ("6.19.0", False), ("6.19", False), ("6.19.1", True), ("7.0.0", True), ("unknown", False),
    ],
)  # fmt: skip
def test_asynchronous_direct_io_is_left_out_on_kernels_that_break_it(release: str, safe: bool) -> None:
    assert wire.async_dio_is_safe(release) is safe


def test_struct_sizes_are_the_kernels() -> None:
    assert wire.HEADER.size == 40
    assert len(wire.attributes(256, 1)) == 88
    assert len(wire.entry_out(256, 1)) == 128
    assert len(wire.attr_out(256, 1)) == 104
    assert len(wire.open_out(1)) == 16
    assert len(wire.statfs_out()) == 80
    assert len(wire.negotiate(init(), async_dio=True)[1]) == 64
    assert len(wire.notify_resend()) == 16


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_typed_error(raw: bytes) -> None:
    try:
        request = wire.Request.parse(raw)
    except InvalidArgument:
        return
    for reader in (wire.read_in, wire.handle_in, wire.name_in, wire.Init.parse):
        with contextlib.suppress(InvalidArgument):
            reader(request.body)
