"""A data plane for tests: synthetic images, a registry that freezes and lies on demand, and blobd on a real kernel.

The keeper is played by a thread of the test, so that tests decide when blobd dies and with what it starts again.
"""

import asyncio
import hashlib
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from blake3 import blake3

from snapshotter import config, control
from snapshotter.crypto import chunk as codec
from snapshotter.digest import Digest
from snapshotter.formats import rafs6
from snapshotter.formats.blobmeta import ChunkInfo, ChunkTable
from snapshotter.formats.blobtable import CIPHER_SEALED, SEALED_FEATURES, BlobEntry
from snapshotter.formats.rafs6_write import BlobTable, Node, write_bootstrap
from snapshotter.mounts.drivers import ErofsMounter
from snapshotter.mounts.syscalls import open_fuse_session
from snapshotter.ondemand.attachment import BlobDevice, pack

CHUNK = 64 << 10
SECRET = b"convergence secret of this image"


def content(seed: int, size: int) -> bytes:
    """Bytes that compress to about half, different for each seed."""
    rng = random.Random(seed)
    words = [rng.randbytes(16) for _ in range(64)]
    return b"".join(rng.choice(words) if rng.random() < 0.6 else rng.randbytes(16) for _ in range(-(-size // 16)))[
        :size
    ]


@dataclass
class SyntheticImage:
    """What an image needs to be attached and served. `files`: path → content."""

    bootstrap: bytes
    devices: list[BlobDevice]
    blobs: dict[str, bytes]
    files: dict[str, bytes]

    def pack(self, image_id: int, repository: str) -> int:
        return pack(
            image_id,
            repository=repository,
            manifest=Digest.of(b"manifest"),
            bootstrap_digest=Digest.of(self.bootstrap),
            bootstrap=self.bootstrap,
            blobs=self.devices,
        )


class _Blob:
    """Chunks of one data blob on their way into its tables."""

    def __init__(self, index: int, chunk_size: int, sealed: bool, algorithm: int) -> None:
        self.index, self.chunk_size, self.sealed, self.algorithm = index, chunk_size, sealed, algorithm
        self.stored, self.digests, self.secrets = bytearray(), bytearray(), bytearray()
        self.chunks = ChunkTable()
        self.device = 0

    def add(self, plain: bytes) -> int:
        digest = blake3(plain).digest()
        packed, used = codec.compress(plain, self.algorithm)
        flags = 1 if used else 0
        if self.sealed:
            secret = codec.derive(SECRET, digest)
            packed = codec.seal(secret, packed, len(plain), used)
            self.secrets += secret
            flags |= 8
        self.chunks.append(ChunkInfo(self.device, len(plain), len(self.stored), len(packed), flags))
        self.stored += packed
        self.digests += digest
        self.device += -(-len(plain) // 4096) * 4096
        return self.index << 32 | len(self.chunks) - 1

    def finish(self) -> tuple[BlobTable, BlobDevice, bytes]:
        stored = bytes(self.stored)
        digest = Digest.of(stored)
        entry = BlobEntry(
            digest.hex, self.index, self.chunk_size, len(self.chunks), self.algorithm, 0,
            SEALED_FEATURES if self.sealed else 0x1, len(stored), self.device,
            ci_compressed_size=24 * len(self.chunks), ci_uncompressed_size=24 * len(self.chunks),
            cipher_algo=CIPHER_SEALED if self.sealed else 0,
        )  # fmt: skip
        device = BlobDevice(
            digest, len(stored), self.device, self.algorithm, 0, self.chunks, bytes(self.digests), bytes(self.secrets)
        )
        return BlobTable(entry, self.chunks, bytes(self.digests)), device, stored


def build(
    *layers: Mapping[str, bytes], sealed: bool = True, chunk_size: int = CHUNK, algorithm: int = codec.CODEC_ZSTD
) -> SyntheticImage:
    """An image with one data blob per layer; paths have no directories but one level (`dir/name`)."""
    root = Node(stat.S_IFDIR | 0o755, children={})
    blobs = []
    files: dict[str, bytes] = {}
    for index, layer in enumerate(layers):
        blob = _Blob(index, chunk_size, sealed, algorithm)
        for path, data in layer.items():
            node = Node(stat.S_IFREG | 0o644, size=len(data))
            for start in range(0, len(data), chunk_size):
                node.chunks.append(blob.add(data[start : start + chunk_size]))
            directory = root
            *parents, name = path.encode().split(b"/")
            for parent in parents:
                assert directory.children is not None
                directory = directory.children.setdefault(parent, Node(stat.S_IFDIR | 0o755, children={}))
            assert directory.children is not None
            directory.children[name] = node
            files[path] = data
        blobs.append(blob.finish())
    compression = rafs6.FLAG_COMPRESSION_ZSTD if algorithm == codec.CODEC_ZSTD else rafs6.FLAG_COMPRESSION_NONE
    flags = rafs6.FLAG_HASH_BLAKE3 | rafs6.FLAG_EXPLICIT_UID_GID | compression
    flags |= rafs6.FLAG_SEALED if sealed else rafs6.FLAG_ENCRYPTION_NONE
    bootstrap = write_bootstrap(root, [table for table, _, _ in blobs], chunk_size=chunk_size, flags=flags)
    return SyntheticImage(
        bootstrap, [device for _, device, _ in blobs], {device.digest: stored for _, device, stored in blobs}, files
    )


_PATH = re.compile(r"/v2/(.+)/blobs/(sha256:[0-9a-f]{64})")


@dataclass
class BlobServer:
    """Serves ranges of blobs on loopback. `flip(repository, digest, offset, data)` may change what is sent."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)  # repositories that do not answer
    flip: Callable[[str, str, int, bytes], bytes] | None = None
    requests: list[tuple[str, str, int, int]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with suppress(OSError):
                    outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 512

            def handle_error(self, *_: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        match = _PATH.fullmatch(handler.path.partition("?")[0])  # a mirror is told the registry's name
        assert match
        repository, digest = match.groups()
        blob = self.blobs[digest]
        start, stop = 0, len(blob)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2]) + 1
        with self.arrived:
            self.requests.append((repository, digest, start, stop))
            self.arrived.notify_all()
        while repository in self.frozen:
            if self.closing.wait(0.02):
                return
        data = blob[start:stop]
        if self.flip:
            data = self.flip(repository, digest, start, data)
        handler.send_response(206 if wanted else 200)
        handler.send_header("Content-Length", str(len(data)))
        if wanted:
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(blob)}")
        handler.end_headers()
        handler.wfile.write(data)

    def wait_for_requests(self, repository: str, count: int, timeout: float = 30) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: sum(r[0] == repository for r in self.requests) >= count, timeout)

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


class Machine:
    """The FUSE session, a keeper's store, blobd as a child process, and mounts."""

    def __init__(self, directory: Path, settings: str = "", driver: str = "auto", cache: Path | None = None) -> None:
        self.root, self.cache = directory / "root", cache or directory / "cache"
        self.root.mkdir(parents=True)
        self.configuration = directory / "config.toml"
        self.configuration.write_text(f'log.level = "debug"\n{settings}')
        self.errors = directory / "blobd.log"
        fuse, fuse_root = open_fuse_session()
        listener = control.listen(self.root / "blobd.sock")
        self.store = {
            "fuse": fuse,
            "fuse-root": fuse_root,
            "session": os.memfd_create("session"),
            "listen-blobd": listener.detach(),
        }
        self._keeper = control.listen(self.root / "keeper.sock")
        self._ready = threading.Event()
        threading.Thread(target=self._keep, daemon=True).start()
        self.process: subprocess.Popen[bytes] | None = None
        self.mounter = ErofsMounter(fuse_root, config.Erofs(driver=driver), child_seconds=20)  # type: ignore[arg-type]
        self.mounts: list[Path] = []

    def _keep(self) -> None:
        while True:
            try:
                peer, _ = self._keeper.accept()
            except OSError:
                return
            with peer, suppress(EOFError, OSError):
                while True:
                    message, fds = control.receive(peer)
                    if message["op"] == "list":
                        for name, fd in list(self.store.items()):
                            control.send(peer, {"name": name}, [fd])
                        control.send(peer, {"end": True})
                    else:
                        self._ready.set()
                        control.send(peer, {})
                    control.close_all(fds)

    def start(self, failpoint: str = "") -> None:
        self._spawn(failpoint)
        assert self._ready.wait(20), self.errors.read_text()[-3000:]

    def start_expecting_death(self, failpoint: str) -> None:
        self._spawn(failpoint)
        assert self.process
        assert self.process.wait(20) == -signal.SIGKILL

    def _spawn(self, failpoint: str) -> None:
        self._ready.clear()
        flags = {"--config": self.configuration, "--root": self.root, "--cache": self.cache, "--address": "/none"}
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "snapshotter.ondemand.blobd", *(str(x) for pair in flags.items() for x in pair)],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                env={**os.environ, "COCO_FAILPOINT": failpoint}, cwd=Path(__file__).parents[1],
            )  # fmt: skip

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(20)

    def request(self, message: dict[str, Any], *fds: int) -> dict[str, Any]:
        return control.request(self.root / "blobd.sock", message, fds, timeout=20)[0]

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.request({"op": "status"})["counters"]
        return found

    def attach(self, image_id: int, image: SyntheticImage, repository: str) -> None:
        memfd = image.pack(image_id, repository)
        self.store[f"image-{image_id}"] = memfd
        self.request({"op": "attach", "id": image_id}, memfd)

    def mount(self, image_id: int, image: SyntheticImage) -> Path:
        target = self.root / f"mnt-{image_id}"
        target.mkdir(exist_ok=True)
        self.mounts.append(target)
        asyncio.run(self.mounter.mount(image_id, len(image.devices) + 1, target))
        return target

    def unmount(self, target: Path) -> None:
        asyncio.run(self.mounter.unmount(target))
        self.mounts.remove(target)

    def clear_cache(self) -> None:
        """Empty the ciphertext cache behind blobd's back."""
        for path in self.cache.rglob("*"):
            if path.is_file():
                path.unlink()

    def close(self) -> None:
        """Unmount everything; with blobd dead and the session closed, nothing can wait any more."""
        if self.process and self.process.poll() is None:
            self.kill()
        self._keeper.shutdown(socket.SHUT_RDWR)
        self._keeper.close()
        control.close_all(self.store.values())
        for target in list(self.mounts):
            subprocess.run(["umount", "-l", target], check=False, stderr=subprocess.DEVNULL)


class Plane:
    """A registry and a machine for one test: `with Plane(tmp_path) as plane`."""

    def __init__(self, directory: Path, settings: str = "", driver: str = "auto", cache: Path | None = None) -> None:
        self.server = BlobServer()
        self.machine = Machine(directory / "machine", settings, driver, cache)

    def __enter__(self) -> "Plane":
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()
        self.server.close()

    def serve(self, image_id: int, image: SyntheticImage, repository: str = "app") -> Path:
        """Attach and mount an image whose blobs this registry has."""
        self.server.blobs.update(image.blobs)
        self.machine.attach(image_id, image, f"{self.server.host}/{repository}")
        return self.machine.mount(image_id, image)


def forget_pages(path: Path) -> None:
    """Drop what the kernel has cached of a file, so that the next read reaches blobd."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Read a range without read-ahead. Raises OSError(EIO) as the reader of a bad chunk sees it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def compare(target: Path, image: SyntheticImage) -> None:
    """Every file of the mount has exactly its content, and there are no others."""
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == set(image.files)
    for name, data in image.files.items():
        got = (target / name).read_bytes()
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest(), name


def wait_until(condition: Callable[[], object], what: str, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)
