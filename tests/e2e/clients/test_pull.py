"""Every kind of image through every way to pull that real clients have."""

import pytest

from tests.e2e.clients.paths import (
    ALL,
    BARE,
    CRI,
    CRI_TRANSFER,
    CTR_TRANSFER,
    LAZY,
    NERDCTL_COCO,
    NERDCTL_NYDUS,
    Puller,
)
from tests.e2e.conftest import Image, Images
from tests.e2e.test_images import ABOVE, READ_ABOVE, READ_ALL, expected
from tests.harness.containerd import NAMESPACE

pytestmark = [pytest.mark.root, pytest.mark.real]

every = pytest.mark.parametrize("path", ALL, ids=str)
lazily = pytest.mark.parametrize("path", LAZY, ids=str)
both = pytest.mark.parametrize("kind", ["sealed", "plain"])


def assert_not_downloaded(puller: Puller, image: Image) -> None:
    """containerd holds the manifest and the config and nothing else."""
    assert puller.containerd.content() == {image.digest, image.manifest["config"]["digest"]}


@both
@lazily
def test_lazy_images_are_not_downloaded(puller: Puller, images: Images, kind: str) -> None:
    image = getattr(images, kind)()
    mark = images.registry.mark()
    reference = puller.pull(image)
    assert_not_downloaded(puller, image)
    asked = {request.agent.partition("/")[0] for request in images.registry.since(mark).of(set(image.layers))}
    assert asked <= {"coco-snapshotter"}
    assert puller.shell(reference, READ_ALL) == expected()
    assert_not_downloaded(puller, image)


@every
def test_ordinary_images(puller: Puller, images: Images) -> None:
    reference = puller.pull(images.ordinary())
    assert puller.shell(reference, READ_ALL) == expected()
    assert set(images.ordinary().layers) <= puller.containerd.content()
    assert not puller.daemon.images_mounted()


@every
def test_an_ordinary_image_that_overlayfs_had_pulled(puller: Puller, images: Images) -> None:
    """Its layers are in the content store; they are unpacked for us without a second download."""
    image = images.ordinary()
    puller.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", image.by_digest)
    mark = images.registry.mark()
    reference = puller.pull(image)
    assert not images.registry.since(mark).of(set(image.layers))
    assert puller.shell(reference, READ_ALL) == expected()
    theirs = puller.containerd.snapshots("overlayfs")
    assert puller.containerd.snapshots().keys() == theirs.keys()


@every
def test_a_container_of_an_image_that_was_unpacked_for_overlayfs_only(puller: Puller, images: Images) -> None:
    """Making the container unpacks it for us, and says nothing about the image to anybody."""
    reference = images.ordinary().by_digest
    puller.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    assert puller.shell(reference, READ_ALL) == expected()


@both
@lazily
def test_a_lazy_image_that_is_in_the_content_store(puller: Puller, images: Images, kind: str) -> None:
    """All of it was downloaded by somebody, for instance by a pull that overlayfs could not unpack."""
    image = getattr(images, kind)()
    elsewhere = puller.containerd.try_ctr(
        "images", "pull", "--plain-http", "--snapshotter", "overlayfs", image.by_digest
    )
    assert "no processor for media-type" in elsewhere.stderr
    assert puller.shell(puller.pull(image), READ_ALL) == expected()
    assert not puller.containerd.snapshots("overlayfs")


@every
def test_images_that_share_layers(puller: Puller, images: Images) -> None:
    kinds = [images.ordinary] if puller.path in BARE else [images.ordinary, images.plain]
    for kind in kinds:
        assert kind(1).layers[0] == kind(2).layers[0]
        first, second = puller.pull(kind(1)), puller.pull(kind(2))
        assert puller.shell(first, READ_ALL) == expected(1)
        assert puller.shell(second, READ_ALL) == expected(2)
        puller.containerd.ctr("images", "rm", "--sync", first)
        assert puller.shell(second, READ_ALL) == expected(2)
        assert puller.shell(puller.pull(kind(1)), READ_ALL) == expected(1)
        puller.remove_all()


@both
@lazily
def test_ordinary_layers_on_a_lazy_base(puller: Puller, images: Images, kind: str) -> None:
    base = getattr(images, kind)()
    image = images.above(base)
    assert puller.shell(puller.pull(image), READ_ABOVE) == ABOVE
    assert not puller.containerd.content() & set(base.layers)
    assert image.layers[-1] in puller.containerd.content()
    assert puller.shell(puller.pull(base), READ_ALL) == expected()


def in_two_namespaces(puller: Puller, image: Image) -> None:
    """Each may remove it without the other noticing."""
    other = puller.in_namespace("elsewhere")
    reference = puller.pull(image)
    other.pull(image)
    assert other.shell(reference, READ_ALL) == expected()
    assert puller.shell(reference, READ_ALL) == expected()
    puller.remove_images()
    assert other.shell(reference, READ_ALL) == expected()
    other.remove_all()


@every
def test_an_ordinary_image_in_two_namespaces(puller: Puller, images: Images) -> None:
    in_two_namespaces(puller, images.ordinary())


@both
@pytest.mark.parametrize("path", [CRI[-1], CRI_TRANSFER, CTR_TRANSFER, *NERDCTL_NYDUS, *NERDCTL_COCO], ids=str)
def test_a_lazy_image_in_two_namespaces(puller: Puller, images: Images, kind: str) -> None:
    in_two_namespaces(puller, getattr(images, kind)())


@pytest.mark.parametrize("path", BARE, ids=str)
def test_an_ordinary_image_unpacked_with_labels_and_without(puller: Puller, images: Images) -> None:
    image = images.ordinary()
    [cri] = [path for path in CRI if path.release is puller.path.release]
    other = Puller(cri, puller.station, NAMESPACE)
    reference = puller.pull(image)
    other.pull(image)
    puller.remove_images()
    assert other.shell(reference, READ_ALL) == expected()
    puller.pull(image)
    other.remove_all()
    assert puller.shell(reference, READ_ALL) == expected()


# without labels


@both
@pytest.mark.parametrize("path", BARE, ids=str)
def test_a_client_that_says_nothing_cannot_have_lazy_images(puller: Puller, images: Images, kind: str) -> None:
    """containerd asks for an empty directory and fails to unpack into it. We never learn what it was for."""
    failed = puller.attempt(getattr(images, kind)().by_digest)
    assert failed.returncode != 0
    assert "application/vnd.oci.image.layer.nydus.blob.v1: no processor for media-type" in failed.stderr
    assert not puller.containerd.snapshots()
