"""Messages with descriptors between the processes, and the sockets and locks they use."""

import asyncio
import errno
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from snapshotter import control
from snapshotter.errors import NotFound


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_descriptor_arrives_with_its_message(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    memfd = os.memfd_create("x")
    os.write(memfd, b"content")
    control.send(left, {"op": "put"}, [memfd])
    os.close(memfd)
    message, (fd,) = control.receive(right)
    assert message == {"op": "put"}
    assert os.pread(fd, 10, 0) == b"content"
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_message_larger_than_a_packet_arrives_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    message = {"images": ["x" * 100] * 1200}
    control.send(left, message, [left.fileno()])
    received, fds = control.receive(right)
    control.close_all(fds)
    assert (received, len(fds)) == (message, 1)


def test_too_large_message_is_refused_before_it_is_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(OSError, match="control message"):
        control.send(pair[0], {"x": "y" * control.MAX_MESSAGE})


@pytest.mark.parametrize("packet", [b".[1]", b".{", b"." + b"[" * 40000, b".\xff", b"+" + b"x" * control._PACKET])
def test_malformed_message_is_a_control_error(pair: tuple[socket.socket, socket.socket], packet: bytes) -> None:
    left, right = pair
    before = open_fds()
    for _ in range(3):
        left.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, left.fileno().to_bytes(4, "little"))])
        left.send(b".")
    with pytest.raises(control.ControlError):
        control.receive(right)
    assert open_fds() <= before  # a collected object of some earlier test may close its own


def test_endless_message_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    assembly = control._Assembly()
    for _ in range(control.MAX_MESSAGE // control._PACKET):
        left.send(b"+" + b" " * control._PACKET)
        assert assembly.take(right) is None
    left.send(b"+" + b" " * control._PACKET)
    with pytest.raises(control.ControlError, match="bounds"):
        assembly.take(right)


def test_peer_that_is_gone_is_an_end_of_file(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    with pytest.raises(EOFError):
        control.receive(pair[1])


class Server:
    """An AsyncServer with one handler for all cases below."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: list[int] = []
        self.listener = control.listen(path)
        self.server = control.AsyncServer(self.listener, self.handle)

    async def handle(self, message: control.Message, fds: list[int]) -> control.Reply | AsyncIterator[control.Reply]:
        match message["op"]:
            case "keep":
                self.kept.append(fds.pop())
                return {"kept": len(self.kept)}, ()
            case "list":
                return self.stream()
            case "large":
                return {"text": "x" * 2_000_000}, ()
            case "missing":
                raise NotFound("no image 7")
            case "ignore":
                return {}, ()
        raise RuntimeError("bug")

    async def stream(self) -> AsyncIterator[control.Reply]:
        for index, fd in enumerate(self.kept):
            yield {"name": f"image-{index}"}, [fd]
        yield {"end": True, "count": len(self.kept)}, ()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    running = Server(tmp_path / "s")
    running.server.start()
    yield running
    await running.server.stop()
    running.listener.close()
    control.close_all(running.kept)


async def test_handler_keeps_what_it_takes_and_the_rest_is_closed(server: Server) -> None:
    before = len(open_fds())
    memfd = os.memfd_create("x")
    assert await asyncio.to_thread(control.request, server.path, {"op": "keep"}, [memfd]) == ({"kept": 1}, [])
    await asyncio.to_thread(control.request, server.path, {"op": "ignore"}, [memfd])
    os.close(memfd)
    found, end = await asyncio.to_thread(control.fetch_all, server.path, {"op": "list"})
    assert end == {"end": True, "count": 1}
    assert os.fstat(found["image-0"]).st_ino == os.fstat(server.kept[0]).st_ino
    control.close_all(found.values())
    assert len(open_fds()) <= before + 3  # the kept one, and what is left of the connections


async def test_large_reply_goes_through(server: Server) -> None:
    reply, _ = await asyncio.to_thread(control.request, server.path, {"op": "large"})
    assert len(reply["text"]) == 2_000_000


async def test_a_stream_ends_with_its_end_or_with_its_error(tmp_path: Path) -> None:
    async def answer(message: control.Message, _: list[int]) -> AsyncIterator[control.Reply]:
        async def parts() -> AsyncIterator[control.Reply]:
            yield {"part": 1}, [0]
            if message["op"] == "fail":
                raise NotFound("gone")
            yield {"end": True, "parts": 1}, ()

        return parts()

    with control.listen(tmp_path / "socket") as listener:
        streaming = control.AsyncServer(listener, answer)
        streaming.start()
        before = open_fds()
        ask = partial(asyncio.to_thread, lambda op: list(control.stream(tmp_path / "socket", {"op": op})))
        assert await ask("list") == [{"part": 1}, {"end": True, "parts": 1}]
        with pytest.raises(control.ControlError, match="gone") as caught:
            await ask("fail")
        assert caught.value.reason == "not-found"
        await streaming.stop()
        assert not open_fds() - before, "descriptors that nobody asked for are closed"


async def test_error_keeps_its_reason(server: Server) -> None:
    with pytest.raises(control.ControlError, match="no image 7") as caught:
        await asyncio.to_thread(control.request, server.path, {"op": "missing"})
    assert caught.value.reason == "not-found"


@pytest.mark.allow_warnings
async def test_bug_in_a_handler_is_answered_and_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(control.ControlError) as caught:
        await asyncio.to_thread(control.request, server.path, {"op": "other"})
    assert caught.value.reason == "internal"
    assert "RuntimeError: bug" in caplog.text


@pytest.mark.root
async def test_other_users_are_not_served(server: Server) -> None:
    with tempfile.TemporaryDirectory() as directory:  # where another user gets at all
        os.chmod(directory, 0o711)
        path = server.path.rename(Path(directory, "s"))
        path.chmod(0o666)
        os.seteuid(65534)  # the peer's credentials are those of the moment of connect(2)
        try:
            client = control.connect(path, 10)
        finally:
            os.seteuid(0)
    with client:
        control.send(client, {"op": "ignore"})
        with pytest.raises((EOFError, ConnectionResetError)):
            await asyncio.to_thread(control.receive, client)


def test_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    control.listen(tmp_path / "s").close()
    with control.listen(tmp_path / "s"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        with pytest.raises(OSError, match="another process listens here"):
            control.listen(tmp_path / "s")


def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        control.listen(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


def test_neither_is_a_directory_a_link_or_a_socket_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "other"))
        for name in ("directory", "link", "other"):
            before = os.lstat(tmp_path / name).st_ino
            with pytest.raises(OSError, match=f"'{tmp_path}/{name}'") as error:
                control.listen(tmp_path / name)
            assert error.value.errno == errno.EADDRINUSE
            assert os.lstat(tmp_path / name).st_ino == before
    control.listen(tmp_path / "other").close()


def test_a_place_where_no_socket_can_be_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "s", tmp_path / ("x" * 120)):
        with pytest.raises(OSError, match=str(path)):
            control.listen(path)


def test_lock_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert control.lock_holder(path) is None
    fd = control.take_lock(path)
    assert control.lock_holder(path) == os.getpid()
    with pytest.raises(BlockingIOError):
        control.take_lock(path)
    os.close(fd)
    assert control.lock_holder(path) is None
