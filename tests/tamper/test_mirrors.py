"""Mirrors that lie, freeze and lose blobs, in front of a registry that is well: a real mount reads every byte right."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dataplane import CHUNK, BlobServer, Plane, SyntheticImage, build, compare, content, forget_pages, read_at

pytestmark = [pytest.mark.root, pytest.mark.allow_warnings]

FILES = {"big": content(1, 30 * CHUNK), "d/small": content(2, 3000)}
SETTINGS = 'cache.quota = 0\nfetch.window = "64KiB"\nregistry.progress_timeout_seconds = 1.5\n'


class Mirrored:
    """A node whose registry has mirrors, all with the same blobs."""

    def __init__(self, directory: Path, mirrors: int) -> None:
        self.image: SyntheticImage = build(FILES)
        self.mirrors = [BlobServer(blobs=dict(self.image.blobs)) for _ in range(mirrors)]
        certs = directory / "certs.d"
        self.plane = Plane(directory, f'{SETTINGS}registry.hosts_dir = "{certs}"\n')
        folder = certs / self.plane.server.host
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text("".join(f'[host."http://{mirror.host}"]\n' for mirror in self.mirrors))

    def serve(self) -> Path:
        self.plane.machine.start()
        return self.plane.serve(1, self.image)

    def close(self) -> None:
        self.plane.__exit__()
        for mirror in self.mirrors:
            mirror.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Mirrored]:
    made = Mirrored(tmp_path, 2)
    yield made
    made.close()


def lie(_repository: str, _digest: str, _offset: int, data: bytes) -> bytes:
    return bytes(byte ^ 0x10 for byte in data)


def test_chunks_that_mirrors_falsify_come_from_the_registry(two: Mirrored) -> None:
    for mirror in two.mirrors:
        mirror.flip = lie
    target = two.serve()
    compare(target, two.image)
    counters = two.plane.machine.counters()
    assert counters["eio"] == 0
    assert counters["verify_failures"] >= 2
    asked = [len(mirror.requests) for mirror in two.mirrors]
    assert all(asked)
    forget_pages(target / "big")
    compare(target, two.image)
    assert [len(mirror.requests) for mirror in two.mirrors] == asked, "they are not asked for this blob again"


def test_when_everybody_lies_it_is_eio_and_heals(two: Mirrored) -> None:
    servers = [*two.mirrors, two.plane.server]
    for server in servers:
        server.flip = lie
    target = two.serve()
    with pytest.raises(OSError, match="Input/output error"):
        read_at(target / "big", 3 * CHUNK, 4096)
    assert all(server.requests for server in servers), "each was asked before"
    two.mirrors[1].flip = None
    compare(target, two.image)


def test_a_mirror_that_freezes_is_left_and_reads_end_in_time(two: Mirrored) -> None:
    target = two.serve()
    assert read_at(target / "big", 0, 10) == FILES["big"][:10]
    assert not two.plane.server.requests
    two.mirrors[0].frozen.add("app")
    del two.mirrors[1].blobs[two.image.devices[0].digest]  # its handler fails: the connection is cut
    forget_pages(target / "big")
    compare(target, two.image)
    assert two.plane.machine.counters()["eio"] == 0
    frozen = len(two.mirrors[0].requests)
    forget_pages(target / "big")
    compare(target, two.image)
    assert len(two.mirrors[0].requests) == frozen, "it is not waited for again"
