"""A start with something broken: it costs what is broken, never the start and never another image."""

import os
import shutil
import sqlite3
from contextlib import closing

import pytest

from snapshotter import control
from tests.e2e.conftest import Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness import serve
from tests.harness.machine import until
from tests.harness.registry import Registry
from tests.harness.tiny import layout

pytestmark = [pytest.mark.root, pytest.mark.real]


def pulled(guest: Node, images: Images, registry: Registry, seed: int) -> str:
    """An image on a registry that can be stopped, pulled and run once."""
    made = layout(guest.work.path / f"bad-{seed}", seed=seed)
    target = f"docker://{registry.address}/t/app:{seed}"
    digest = serve.convert(guest.work, f"oci:{made.path}:tiny", target, "--recipient", f"jwe:{images.public}")
    reference = f"{registry.address}/t/app@{digest}"
    guest.containerd.cri.pull(reference)
    assert guest.shell(reference, READ_ALL) == expected(seed)
    return reference


def test_bad_images_do_not_keep_the_others_from_being_served(node: NodeMaker, images: Images) -> None:
    """With the registry and the credentials gone: one damaged in the cache, one whose record cannot be read."""
    guest = node()
    registry = Registry(guest.work, "private")
    damaged, unreadable, good = (pulled(guest, images, registry, seed) for seed in (4, 5, 6))
    known = {image["reference"]: image["bootstrap"] for image in guest.daemon.status()["images"]}
    guest.daemon.stop()
    registry.process.stop()
    bootstrap = guest.daemon.cache / "bootstraps" / known[damaged].removeprefix("sha256:")
    bootstrap.write_bytes(bytes(bootstrap.stat().st_size))
    with closing(sqlite3.connect(guest.daemon.root / "metadata.db")) as database:
        query = "SELECT id FROM image WHERE record LIKE ?"
        (number,) = database.execute(query, (f"%{unreadable}%",)).fetchone()
        database.execute("UPDATE image SET record = '{' WHERE id = ?", (number,))
        database.commit()
    (guest.daemon.root / f"snapshots/{number}/snapshot.json").write_text("{")
    guest.daemon.start()
    guest.containerd.wait_connected()
    assert guest.shell(good, READ_ALL) == expected(6)
    for reference, reason in ((damaged, "registry"), (unreadable, "reason=lost")):
        result = guest.containerd.run(reference, "/bin/cat", "/data/small", timeout=240)
        assert result.returncode != 0
        assert reason in result.stderr
    for reference in (damaged, unreadable, good):
        guest.containerd.remove_image(reference)
    guest.containerd.wait_for_no_snapshots()


def test_attachments_that_make_no_sense_are_seen_to(node: NodeMaker, images: Images) -> None:
    """One that is garbage does not keep blobd from starting, and one that nobody knows is let go."""
    guest = node()
    reference = guest.pull(images.sealed())
    assert guest.shell(reference, READ_ALL) == expected()
    root = guest.daemon.root
    garbage = os.memfd_create("garbage")
    os.write(garbage, b"garbage" * 1000)
    control.request(root / "keeper.sock", {"op": "put", "name": "image-98"}, [garbage])
    os.close(garbage)
    guest.daemon.wait_replaced("blobd", guest.daemon.kill("blobd"))
    assert guest.shell(reference, READ_ALL) == expected()

    guest.daemon.wait_replaced("snapshotd", guest.daemon.kill("snapshotd"))
    (attached,) = control.request(root / "blobd.sock", {"op": "status"})[0]["images"]
    guest.daemon.terminate()
    for name in ("metadata.db", "snapshots"):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    guest.daemon.start()
    until(lambda: not control.request(root / "blobd.sock", {"op": "status"})[0]["images"], f"{attached} is let go")
