"""A slow, recorded link: a loopback TCP forwarder with round-trip time and bandwidth that keeps every byte it carries.

Runs as a process of its own (`python -m tests.harness.link`), so that the one who measures does not also forward. All
connections of a direction share its bandwidth. The record is one file per connection and direction.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from tests.harness.machine import Work, free_port
from tests.harness.process import Process

_PIECE = 16 << 10


class Pipe:
    """One direction of the link: bytes leave in order, not before `delay` and not faster than `rate` bytes a second."""

    def __init__(self, delay: float, rate: float) -> None:
        self._delay = delay
        self._rate = rate
        self._free_at = 0.0

    def arrival(self, size: int) -> tuple[float, float]:
        """When a piece sent now has left the sender's queue, and when it reaches the other end."""
        sent = max(self._free_at, time.monotonic())
        if self._rate:
            sent += size / self._rate
        self._free_at = sent
        return sent, sent + self._delay


class Link:
    """Accepts connections and forwards each to `upstream`."""

    def __init__(self, upstream: tuple[str, int], round_trip: float, rate: float, record: Path | None) -> None:
        self._upstream = upstream
        self._round_trip = round_trip
        self._up = Pipe(round_trip / 2, rate)
        self._down = Pipe(round_trip / 2, rate)
        self._record = record
        self._connections = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        await asyncio.sleep(self._round_trip)  # the TCP handshake
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            self._carry(reader, far_writer, self._up, f"{number:05}-up"),
            self._carry(far_reader, writer, self._down, f"{number:05}-down"),
        )

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pipe: Pipe, name: str) -> None:
        queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
        delivery = asyncio.create_task(_deliver(queue, writer))
        file: BinaryIO | None = (self._record / name).open("wb", buffering=0) if self._record else None
        try:
            while data := await reader.read(_PIECE):
                if file:
                    file.write(data)
                sent, arrives = pipe.arrival(len(data))
                queue.put_nowait((arrives, data))
                ahead = sent - time.monotonic()
                if ahead > 0.02:  # a sender waits when the link's queue is full
                    await asyncio.sleep(ahead - 0.01)
        except OSError:
            pass  # a reset ends the direction like an end of file
        finally:
            if file:
                file.close()
            queue.put_nowait(None)
            await delivery


async def _deliver(queue: "asyncio.Queue[tuple[float, bytes] | None]", writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while item := await queue.get():
            arrives, data = item
            if (wait := arrives - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            writer.write(data)
            await writer.drain()
    writer.close()


class ShapedLink:
    """A running link in front of `upstream` (host:port). Clients connect to `address`."""

    def __init__(
        self,
        work: Work,
        upstream: str,
        *,
        round_trip_ms: float = 0,
        megabits: float = 0,
        name: str = "link",
        record: bool = True,
    ) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.record = work.directory(f"{name}-record")
        self.process = Process(
            work, name,
            [sys.executable, "-m", __name__, str(port), upstream, str(round_trip_ms), str(megabits),
             *([self.record] if record else [])],
            environment={"PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        self.process.wait_until(lambda: "ready" in self.process.output(), "it listens")

    def streams(self) -> Iterator[tuple[str, bytes]]:
        """Each recorded connection and direction: (name, all its bytes)."""
        for path in sorted(self.record.iterdir()):
            yield path.name, path.read_bytes()


async def _serve(arguments: argparse.Namespace) -> None:
    host, _, port = arguments.upstream.rpartition(":")
    rate = arguments.megabits * 1e6 / 8
    link = Link((host, int(port)), arguments.round_trip_ms / 1000, rate, arguments.record)
    server = await asyncio.start_server(link.handle, "127.0.0.1", arguments.port, limit=4 * _PIECE)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("upstream")
    parser.add_argument("round_trip_ms", type=float)
    parser.add_argument("megabits", type=float)
    parser.add_argument("record", type=Path, nargs="?")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
