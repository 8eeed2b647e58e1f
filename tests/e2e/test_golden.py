"""State directories of earlier releases, as they were left, open in this program: everything is there and works."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from snapshotter.snapshots.model import Kind
from tests.conformance.client import Client
from tests.conformance.layers import mounted
from tests.golden.state import DATA, HELLO, PLUGIN, known
from tests.harness.machine import Work, until
from tests.harness.serve import Serve

pytestmark = pytest.mark.root

ARCHIVES = sorted((Path(__file__).parents[1] / "golden").glob("state-*.tar.xz"))


class Node:
    """`serve` on the unpacked state, without the registry that its image came from."""

    def __init__(self, work: Work, archive: Path) -> None:
        self.path = work.directory("golden")
        with tarfile.open(archive) as tar:
            tar.extractall(self.path, filter="fully_trusted")
        self.expected: dict[str, Any] = json.loads((self.path / "known.json").read_text())
        settings = {"keys": {"files": [str(self.path / "key.pem")]}, "mode": "open"}
        self.serve = Serve(work, settings=settings, root=self.path / "root", cache=self.path / "cache")
        self.client = Client(self.serve.address, PLUGIN)
        work.stack.callback(self.client.close)


def test_there_is_one_of_every_release() -> None:
    assert [path.name for path in ARCHIVES] == ["state-0.1.0.tar.xz"]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
@pytest.mark.parametrize("lost", ["nothing", "the database"])
def test_the_state_of_a_release(work: Work, archive: Path, lost: str) -> None:
    """Also from the sidecars alone, which are a format of their own."""
    if lost == "the database":
        archive = without_database(archive, work)
    node = Node(work, archive)
    sn = node.client
    found = known(sn)
    assert found["snapshots"] == node.expected["snapshots"]
    assert found["usage"] == node.expected["usage"]
    [shown] = node.serve.status()["images"]
    image = next(name for name, (_, _, _, _, labels) in found["snapshots"].items()
                 if "containerd.io/snapshot/nydus-bootstrap" in labels)  # fmt: skip
    assert shown["manifest"] == found["snapshots"][image][4]["containerd.io/snapshot/cri.manifest-digest"]

    with mounted(sn.mounts("container"), work.path) as top:
        assert {path.name for path in top.iterdir()} == {"top", "directory", "written"}
        assert (top / "top").read_text() == "content of top\n"
        (top / "more").write_text("written by the new program")
    with mounted(sn.mounts("look"), work.path) as top:
        assert {path.name for path in top.iterdir()} == {"base", "top", "directory"}
    with mounted(sn.mounts("lazy-container"), work.path) as top:
        assert (top / "etc/hello").read_bytes() == b"changed\n"
        assert (top / "link").read_bytes() == DATA
    with mounted(sn.prepare("new", image), work.path) as top:
        assert (top / "etc/hello").read_bytes() == HELLO

    sn.commit("committed", "container")
    assert sn.stat("committed").kind is Kind.COMMITTED
    sn.update("labelled", {"added": ""}, "labels.added")
    assert len(sn.stat("labelled").labels) == 39
    for name in ("new", "lazy-container", "look", "labelled", "committed", "top", "base"):
        sn.remove(name)
    while rest := [info.name for info in sn.walk()]:
        parents = {info.parent for info in sn.walk()}
        sn.remove(next(name for name in rest if name not in parents))
    sn.cleanup()
    until(lambda: not list((node.path / "root" / "snapshots").iterdir()), "all directories are gone", 30)
    assert node.serve.status()["images"] == []


def without_database(archive: Path, work: Work) -> Path:
    """The same archive as a crash of the disk might leave it."""
    copy = work.path / archive.name
    with tarfile.open(archive) as old, tarfile.open(copy, "w:xz") as new:
        for member in old:
            if member.name != "root/metadata.db":
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
    shutil.copystat(archive, copy)
    return copy
