"""Mode confidential through real clients: what runs, and what each client says of the rest."""

from collections.abc import Iterator

import pytest

from tests.e2e.clients.paths import BARE, CRI, CTR_TRANSFER, NERDCTL_COCO, NERDCTL_NYDUS, Puller, Stations
from tests.e2e.conftest import Images
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.machine import Work, until

pytestmark = [pytest.mark.root, pytest.mark.real]

naming = pytest.mark.parametrize("path", [CRI[0], CTR_TRANSFER, NERDCTL_NYDUS[-1]], ids=str)  # say which image it is


@pytest.fixture(scope="module")
def stations(images: Images) -> Iterator[Stations]:
    with Work("confidential") as work:
        yield Stations(work, images, mode="confidential")


def refusal(puller: Puller, reference: str) -> str:
    """What the client prints; nothing may be left of the attempt."""
    failed = puller.attempt(reference)
    assert failed.returncode != 0

    def collected() -> bool:
        puller.containerd.collect_garbage()
        return not puller.containerd.snapshots()

    until(collected, "what was rightly there of the lower layers is gone", 15)
    return failed.stderr


@naming
def test_a_sealed_image_by_digest_runs(puller: Puller, images: Images) -> None:
    assert puller.shell(puller.pull(images.sealed()), READ_ALL) == expected()


@naming
def test_what_must_not_run_is_refused_with_its_reason(puller: Puller, images: Images) -> None:
    assert "reason=unauthentic-image" in refusal(puller, images.sealed().by_tag)
    assert "reason=not-sealed" in refusal(puller, images.plain().by_digest)
    assert "reason=not-sealed" in refusal(puller, images.ordinary().by_digest)
    assert "reason=not-sealed" in refusal(puller, images.above(images.sealed()).by_digest)


@pytest.mark.parametrize("path", [CTR_TRANSFER], ids=str)
def test_each_namespace_is_judged_for_itself_and_shares_what_is_there(puller: Puller, images: Images) -> None:
    image = images.sealed()
    reference = puller.pull(image)
    mark = images.registry.mark()
    other = puller.in_namespace("other")
    assert "reason=unauthentic-image" in refusal(other, image.by_tag)
    other.pull(image)
    assert not images.registry.since(mark).of(set(image.layers)), "what the node has is not fetched again"
    assert len(puller.daemon.status()["images"]) == 1
    for each in (puller, other):
        assert each.shell(reference, READ_ALL) == expected()
    assert len(puller.daemon.images_mounted()) == 1
    other.remove_images()
    assert puller.shell(reference, READ_ALL) == expected()


@pytest.mark.parametrize("path", [NERDCTL_COCO[-1]], ids=str)
def test_hints_prove_nothing_about_the_config_that_runs(puller: Puller, images: Images) -> None:
    assert "reason=unauthentic-image" in refusal(puller, images.sealed().by_digest)


@pytest.mark.parametrize("path", [BARE[0], BARE[-1]], ids=str)
def test_what_a_client_unpacks_without_naming_an_image_is_not_committed(puller: Puller, images: Images) -> None:
    assert "was never verified and is not committed" in refusal(puller, images.ordinary().by_digest)


@pytest.mark.parametrize("path", [NERDCTL_NYDUS[-1]], ids=str)
def test_a_container_cannot_become_an_image(puller: Puller, images: Images) -> None:
    nerdctl, reference = puller.nerdctl, puller.pull(images.sealed())
    nerdctl.start("changing", reference)
    failed = nerdctl.attempt("commit", "changing", "changed:1")
    nerdctl("rm", "-f", "changing")
    assert failed.returncode != 0
    assert "was never verified and is not committed" in failed.stderr
