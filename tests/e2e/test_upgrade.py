"""`reload` to another version of the program while a container's files are read: no read fails, whatever is there."""

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapshotter import __version__
from tests.e2e.conftest import Image, Images
from tests.harness.containerd import Container, Containerd
from tests.harness.machine import Work, until
from tests.harness.serve import Serve
from tests.harness.tiny import data, text

pytestmark = [pytest.mark.root, pytest.mark.real]

CHECKOUT = Path(__file__).parents[2]
NEXT = "99.1.0"


class Installed:
    """The program as a package manager leaves it: a directory of a version, and a link that says which one counts."""

    def __init__(self, work: Work) -> None:
        self.path = work.path / "installed"
        self._versions = work.directory("versions")

    def install(self, version: str) -> Path:
        """Put a copy of this program under another version's name beside the others; it does not count yet."""
        place = self._versions / version
        shutil.copytree(CHECKOUT / "snapshotter", place / "snapshotter", ignore=shutil.ignore_patterns("__pycache__"))
        init = place / "snapshotter" / "__init__.py"
        init.write_text(init.read_text().replace(f'"{__version__}"', f'"{version}"'))
        return place / "snapshotter"

    def use(self, version: str) -> None:
        new = self._versions / "link"
        new.symlink_to(self._versions / version)
        new.rename(self.path)


class Readers:
    """Threads that read a container's files again and again, past the page cache, and compare."""

    def __init__(self, root: Path) -> None:
        self._expected = {root / "data" / "random": data(), root / "data" / "text": text()}
        self._digests = {path: hashlib.sha256(content).digest() for path, content in self._expected.items()}
        self._ended = threading.Event()
        self.rounds = 0
        self.failures: list[str] = []

    def _read(self) -> None:
        while not self._ended.is_set():
            for path, digest in self._digests.items():
                try:
                    with path.open("rb", buffering=0) as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        seen = hashlib.sha256(file.read()).digest()
                except OSError as error:
                    self.failures.append(f"{path.name}: {error}")
                else:
                    self.failures += [] if seen == digest else [f"{path.name}: wrong content"]
            self.rounds += 1

    @contextmanager
    def running(self) -> Iterator["Readers"]:
        threads = [threading.Thread(target=self._read) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(60)

    def progress(self) -> None:
        """Wait for two rounds that began after now."""
        goal = self.rounds + 4
        until(lambda: self.rounds >= goal, "the readers make progress", 60)
        assert self.failures == []


class Node:
    def __init__(self, work: Work, images: Images) -> None:
        self.installed = Installed(work)
        self.installed.install(__version__)
        self.installed.use(__version__)
        # Nothing is cached, so that every read needs blobd and the registry.
        settings = {"keys": {"files": [str(images.key)]}, "cache": {"quota": 0}}
        self.daemon = Serve(work, settings=settings, environment={"PYTHONPATH": str(self.installed.path)})
        self.containerd = Containerd(work, "containerd", plugins={"coco": self.daemon.address})

    @contextmanager
    def container(self, image: Image) -> Iterator[Container]:
        self.containerd.cri.pull(image.by_digest)
        container = self.containerd.start(image.by_digest, "/bin/sleep", "1000")
        try:
            container.wait_running()
            yield container
        finally:
            container.kill()

    def reload(self) -> None:
        assert self.daemon.process
        self.daemon.process.signal(signal.SIGHUP)

    def refusal(self) -> str:
        """Reload, and why that was refused."""
        known = len(self._refusals())
        self.reload()
        until(lambda: len(self._refusals()) > known, "the reload is refused", 30)
        return str(self._refusals()[-1]["cause"])

    def _refusals(self) -> list[dict[str, Any]]:
        return [event for event in self.daemon.events() if str(event.get("event")).startswith("reload refused")]

    def serves(self, version: str) -> bool:
        status = self.daemon.try_status()
        return status is not None and set(status["versions"].values()) == {version}


@pytest.fixture
def node(work: Work, images: Images) -> Node:
    return Node(work, images)


def root_of(container: Container) -> Path:
    return Path(f"/proc/{container.pid}/root")


def test_upgrade_under_load(node: Node, images: Images) -> None:
    """Twice: there and back again."""
    image = images.sealed()
    node.installed.install(NEXT)
    with node.container(image) as container, Readers(root_of(container)).running() as readers:
        before = node.daemon.pids()
        for version in (NEXT, __version__):
            readers.progress()
            node.installed.use(version)
            node.reload()
            until(lambda version=version: node.serves(version), f"all three are {version}", 30, every=0.2)  # type: ignore[misc]
            readers.progress()
        after = node.daemon.pids()
        assert after["keeper"] == before["keeper"]
        assert not {after["snapshotd"], after["blobd"]} & {before["snapshotd"], before["blobd"]}
    node.containerd.wait_connected()
    assert node.containerd.run(image.by_digest, "/bin/cat", "/data/small").stdout == "small 1\n"


def test_reload_to_what_cannot_serve_is_refused(node: Node, images: Images) -> None:
    """One broken version after the other, with the container reading on, until a good one comes."""
    with node.container(images.sealed()) as container, Readers(root_of(container)).running() as readers:
        before = node.daemon.pids()
        for number, broken in enumerate(("keeper.py", "daemon.py", "ondemand/session.py", "mounts/oneshot.py")):
            (node.installed.install(f"99.{number}") / broken).write_text("def main(:\n")
            node.installed.use(f"99.{number}")
            assert broken in node.refusal()
        config = node.daemon.config.read_text()
        node.daemon.config.write_text("[cache]\nqouta = 1\n")
        node.installed.install(NEXT)
        node.installed.use(NEXT)
        assert "qouta" in node.refusal()
        node.daemon.config.write_text(config)
        readers.progress()
        assert node.daemon.pids() == before
        node.reload()
        until(lambda: node.serves(NEXT), f"all three are {NEXT}", 30, every=0.2)
        readers.progress()
