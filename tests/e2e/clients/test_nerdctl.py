"""nerdctl under both names: containers, and what it makes of the images of containers."""

import pytest

from tests.e2e.clients.paths import NERDCTL_COCO, NERDCTL_NYDUS, Puller
from tests.e2e.conftest import Images
from tests.e2e.test_images import READ_ALL, expected

pytestmark = [pytest.mark.root, pytest.mark.real]

nerdctl_paths = pytest.mark.parametrize("path", [*NERDCTL_NYDUS, *NERDCTL_COCO], ids=str)
CHANGE = "echo changed >/data/small; rm /data/text; mkdir /new"
CHANGED = "cat /data/link; ls / | grep new; ls /data", "changed\nnew\nempty\nlink\nrandom\nsmall\n"


@pytest.mark.parametrize("kind", ["sealed", "plain", "ordinary"])
@nerdctl_paths
def test_a_container_is_committed_pushed_and_run_elsewhere(puller: Puller, images: Images, kind: str) -> None:
    nerdctl, image = puller.nerdctl, getattr(images, kind)()
    reference = puller.pull(image)
    nerdctl("run", "--rm", "--net", "none", "--pull", "never", reference, "test", "-s", "/data/random")
    assert nerdctl.shell(reference, READ_ALL) == expected()
    nerdctl.start("changing", reference)
    nerdctl("exec", "changing", "sh", "-c", CHANGE)
    script, output = CHANGED
    committed = f"{images.registry.address}/t/app:committed-{puller.namespace}"
    nerdctl("commit", "changing", committed)
    assert set(image.layers) <= puller.containerd.content(), "nerdctl fetches what it is going to push"
    assert nerdctl.shell(committed, script) == output
    if kind == "plain":  # its first chunk makes a data blob look like a zstd stream, where nerdctl looks at blobs
        assert "magic number mismatch" in nerdctl.attempt("push", committed).stderr
        nerdctl("push", "--all-platforms", committed)
    else:
        nerdctl("push", committed)
    nerdctl("rm", "-f", "changing")
    puller.remove_all()
    nerdctl("pull", committed)
    assert nerdctl.shell(committed, script) == output
    if kind != "ordinary":
        assert not puller.containerd.content() & set(image.layers), "pulled again, the base is lazy again"


@pytest.mark.parametrize("kind", ["sealed", "plain"])
@nerdctl_paths
def test_a_lazy_image_is_saved_whole_and_tagged_and_pushed(puller: Puller, images: Images, kind: str) -> None:
    nerdctl, image = puller.nerdctl, getattr(images, kind)()
    reference = puller.pull(image)
    archive = puller.containerd.home / f"{puller.namespace}.tar"
    nerdctl("save", "-o", str(archive), reference)
    assert set(image.layers) <= puller.containerd.content()
    assert archive.stat().st_size > sum(layer["size"] for layer in image.manifest["layers"])
    archive.unlink()
    copied = f"{images.registry.address}/t/copied-{puller.namespace}:1"
    nerdctl("tag", reference, copied)
    nerdctl("push", "--all-platforms", copied)
    converted = nerdctl.attempt("image", "convert", "--oci", reference, f"{copied}-converted")
    if kind == "plain":  # its first chunk makes a data blob look like a zstd stream
        assert "magic number mismatch" in converted.stderr
    else:
        assert converted.returncode == 0
    raw, _ = images.registry.get_manifest(f"t/copied-{puller.namespace}", "1")
    assert raw == images.registry.get_manifest(images.repository, image.digest)[0]


@pytest.mark.parametrize("kind", ["sealed", "plain"])
@pytest.mark.parametrize("path", [NERDCTL_NYDUS[-1]], ids=str)
def test_what_nerdctl_cannot_do_with_lazy_images(puller: Puller, images: Images, kind: str) -> None:
    """`load` unpacks without saying of which image, as `ctr pull` of 1.x; a registry is the way to carry an image."""
    nerdctl, image = puller.nerdctl, getattr(images, kind)()
    reference = puller.pull(image)
    archive = puller.containerd.home / f"{puller.namespace}.tar"
    nerdctl("save", "-o", str(archive), reference)
    puller.remove_all()
    failed = nerdctl.attempt("load", "-i", str(archive))
    archive.unlink()
    assert failed.returncode != 0
    assert "no processor for media-type" in failed.stderr
    assert not puller.containerd.snapshots()
    assert nerdctl.shell(puller.pull(image), READ_ALL) == expected()
