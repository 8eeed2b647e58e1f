"""A client that hands on the annotations of layers and nothing else, as nerdctl does for plugins it does not know."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from snapshotter.labels import SNAPSHOT_REF
from tests.conformance.client import Client
from tests.conformance.layers import mounted
from tests.e2e.conftest import Image, Images
from tests.harness import tiny
from tests.harness.machine import Work
from tests.harness.serve import Serve

pytestmark = [pytest.mark.root, pytest.mark.real]


def pull(client: Client, image: Image) -> Iterator[str]:
    """The names of the image's snapshots, bottom first, as a client learns them that unpacks it."""
    chain = parent = ""
    for layer, diff_id in zip(image.manifest["layers"], image.config["rootfs"]["diff_ids"], strict=True):
        chain = f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}" if chain else diff_id
        kept = {key: value for key, value in layer["annotations"].items() if key.startswith("containerd.io/snapshot/")}
        with pytest.raises(grpc.RpcError) as caught:
            client.prepare(f"extract {chain}", parent, {SNAPSHOT_REF: chain, **kept})
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS, caught.value.details()
        parent = client.walk(f'labels."{SNAPSHOT_REF}"=={chain},parent=="{parent}"')[0].name
        yield parent


@pytest.mark.parametrize("kind", ["sealed", "plain"])
def test_an_image_is_lazy_by_its_hints(work: Work, images: Images, tmp_path: Path, kind: str) -> None:
    image: Image = getattr(images, kind)()
    daemon = Serve(work, "coco", {"keys": {"files": [str(images.key)]}})
    client = Client(daemon.address, "hints")
    work.stack.callback(client.close)
    mark = images.registry.mark()
    snapshots = list(pull(client, image))
    tag = f"coco-{image.layers[-1].removeprefix('sha256:')}"
    asked = [request.path for request in images.registry.since(mark) if "/manifests/coco-" in request.path]
    assert asked == [f"/v2/{images.repository}/manifests/{tag}"], "once a pull, however many layers"
    with mounted(client.prepare("container", snapshots[-1]), tmp_path) as root:
        assert (root / "data/random").read_bytes() == tiny.data(1)
        (root / "data/small").write_text("changed")
        [shown] = daemon.status()["images"]
    hinted = f"{images.registry.address}/{images.repository}:{tag}"
    assert (shown["reference"], shown["manifest"], shown["mounted"]) == (hinted, image.digest, True)
    daemon.stop()  # and forget all that is only in memory
    daemon.start()
    with mounted(client.mounts("container"), tmp_path) as root:
        assert (root / "data/small").read_text() == "changed"
        assert (root / "data/text").read_bytes() == tiny.text(1)
    for name in ("container", *reversed(snapshots)):
        client.remove(name)
    client.cleanup()
    assert not daemon.status()["images"]
    assert not daemon.images_mounted()


def test_after_a_reboot_hints_are_hints_again(work: Work, images: Images, tmp_path: Path) -> None:
    """Nothing is known of the config that a client has for its image, so where that matters it is refused as before."""
    image = images.sealed()
    root = work.directory("memory")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "tmpfs", root], check=True)
    work.stack.callback(subprocess.run, ["umount", str(root)], check=True)
    settings = {"keys": {"files": [str(images.key)]}}
    daemon = Serve(work, "coco", settings, root=root / "state")
    client = Client(daemon.address, "hints")
    work.stack.callback(client.close)
    top = list(pull(client, image))[-1]
    daemon.stop()
    shutil.rmtree(root / "state")
    daemon.start()
    with mounted(client.prepare("container", top), tmp_path) as files:
        assert (files / "data/random").read_bytes() == tiny.data(1)
    daemon.stop()
    shutil.rmtree(root / "state")
    strict = Serve(work, "coco", settings | {"mode": "confidential"}, root=root / "state")
    client = Client(strict.address, "hints")
    work.stack.callback(client.close)
    with pytest.raises(grpc.RpcError, match="unauthentic-image"):
        client.prepare("container", top)
