"""What an operator sees of a node and cleans up on it, with real containers around."""

import json
import os
import shutil
import time
from typing import Any

import pytest

from tests.e2e.conftest import Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.machine import until
from tests.harness.serve import program

pytestmark = [pytest.mark.root, pytest.mark.real]


def command(node: Node, *arguments: str) -> str:
    result = program(node.work, arguments[0], "--config", node.daemon.config, *arguments[1:])
    assert result.returncode == 0, result.stderr
    return result.stdout


def asked(node: Node, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command(node, *arguments, "--json"))
    return found


def test_ls_shows_who_uses_images_and_gc_lets_go_of_the_others(node: NodeMaker, images: Images) -> None:
    guest = node()
    sealed, plain = guest.pull(images.sealed()), guest.pull(images.plain())
    container = guest.containerd.start(sealed, "/bin/sleep", "1000")
    container.wait_running()
    found = {image["reference"]: image for image in asked(guest, "ls")["images"]}
    assert found.keys() == {sealed, plain}
    assert (found[sealed]["sealed"], found[sealed]["mounted"], found[sealed]["users"]) == (True, True, 1)
    assert (found[plain]["sealed"], found[plain]["mounted"], found[plain]["users"]) == (False, False, 0)
    [key] = found[sealed]["snapshots"]
    assert key.endswith(f"/{container.identity}")
    assert 0 < found[sealed]["cached"]["bytes"] < found[sealed]["cached"]["of"]
    assert found[plain]["cached"] is None
    assert container.exec("cat", "/data/random").returncode == 0
    again = next(image for image in asked(guest, "ls")["images"] if image["reference"] == sealed)
    assert again["cached"]["bytes"] > found[sealed]["cached"]["bytes"] + 2_900_000

    snapshots = asked(guest, "ls", "--snapshots")["snapshots"]
    [active] = [row for row in snapshots if row["kind"] == "active"]
    assert (active["name"], active["plugin"]) == (key, "coco")
    assert len(snapshots) == len(guest.containerd.snapshots())
    assert all(row["size"] is not None and time.time() - row["created"] < 600 for row in snapshots)
    assert sealed in command(guest, "ls")
    assert key in command(guest, "ls", "--snapshots")

    assert guest.shell(plain, READ_ALL) == expected()
    until(lambda: len(guest.containerd.snapshots()) == 7, "the second container's snapshot has gone")
    left = guest.daemon.root / "snapshots" / "old-1-left"
    left.mkdir()
    done = asked(guest, "gc")
    assert done["unmounted"] == [plain]
    assert not left.exists()
    assert done["kept"] == []
    assert len(guest.daemon.images_mounted()) == 1
    assert container.exec("cat", "/data/small").stdout == "small 1\n"
    assert guest.shell(plain, READ_ALL) == expected(), "the next container mounts it again"
    container.kill()


def test_prune_drops_metadata_of_images_that_went_and_chunks_on_demand(node: NodeMaker, images: Images) -> None:
    guest = node()
    kept, gone = guest.pull(images.sealed()), guest.pull(images.plain())
    for reference in (kept, gone):
        assert guest.shell(reference, READ_ALL) == expected()
    guest.containerd.remove_image(gone)
    until(lambda: len(guest.containerd.snapshots()) == 3, "the image's snapshots have gone")
    cache = guest.daemon.cache
    assert asked(guest, "prune")["metadata"]["entries"] == 0, "what was just written may belong to a pull"
    for path in [*(cache / "bootstraps").iterdir(), *(cache / "documents").iterdir()]:
        os.utime(path, (0, 0))
    done = asked(guest, "prune")
    assert done["metadata"]["entries"] == 3, "bootstrap layer, manifest and config"
    assert done["chunks"]["entries"] == 0
    assert [path.name for path in (cache / "bootstraps").iterdir()] == [images.sealed().layers[-1][7:]]
    assert guest.shell(kept, READ_ALL) == expected()

    before = guest.daemon.status()["cache"]
    assert asked(guest, "prune", "--older", "1h")["chunks"]["entries"] == 0
    half = asked(guest, "prune", "--target", str(before["bytes"] // 2))["chunks"]
    assert before["bytes"] // 2 <= half["bytes"] < before["bytes"]
    rest = asked(guest, "prune", "--all")["chunks"]
    assert half["entries"] + rest["entries"] == before["entries"]
    assert not [path for path in (cache / "chunks").rglob("*") if path.is_file()]
    shutil.rmtree(cache / "documents")
    guest.daemon.terminate()
    guest.daemon.start()
    guest.containerd.wait_connected()
    assert guest.shell(kept, READ_ALL) == expected(), "everything is fetched again"
