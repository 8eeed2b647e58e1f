"""Who may run here: every way step 0 of the order of trust can end."""

import pytest

from snapshotter.config import Policy
from snapshotter.digest import Digest
from snapshotter.errors import ConfigError, PolicyDenied
from snapshotter.image.policy import ImagePolicy
from snapshotter.registry.reference import Reference

MANIFEST = Digest.of(b"manifest")
INDEX = Digest.of(b"index")
OTHER = Digest.of(b"other")
TAG = Reference.parse("registry.example:5000/team/app:1")
BY_DIGEST = Reference.parse(f"registry.example:5000/team/app@{MANIFEST}")
PIN = f"registry.example:5000/team/app@{MANIFEST}"


def policy(mode: str = "open", require: str = "any", *pins: str) -> ImagePolicy:
    return ImagePolicy.of(mode, Policy(require=require, pins=pins))  # type: ignore[arg-type]


def test_open_any_admits_a_tag_as_not_authentic() -> None:
    admission = policy().admit(TAG, [MANIFEST])
    assert (admission.authentic, admission.rule) == (False, "open")


@pytest.mark.parametrize(("mode", "require"), [("confidential", "any"), ("open", "pinned"), ("confidential", "pinned")])
def test_an_unpinned_tag_is_unauthentic(mode: str, require: str) -> None:
    with pytest.raises(PolicyDenied) as caught:
        policy(mode, require).admit(TAG, [MANIFEST])
    assert caught.value.reason == "unauthentic-image"
    assert "team/app:1" in str(caught.value)


@pytest.mark.parametrize(("mode", "require"), [("confidential", "any"), ("open", "pinned")])
def test_a_reference_by_digest_is_authentic(mode: str, require: str) -> None:
    assert policy(mode, require).admit(BY_DIGEST, [MANIFEST]).rule == "reference-digest"


def test_an_index_named_by_the_reference_is_authentic() -> None:
    reference = Reference.parse(f"registry.example:5000/team/app@{INDEX}")
    assert policy("confidential").admit(reference, [INDEX, MANIFEST]).authentic


def test_a_manifest_the_reference_does_not_name_is_refused_even_in_mode_open() -> None:
    with pytest.raises(PolicyDenied):
        policy().admit(BY_DIGEST, [OTHER])


def test_a_tag_of_a_pinned_repository_resolves_to_a_pin() -> None:
    assert policy("confidential", "any", PIN).admit(TAG, [MANIFEST]).rule == "pin"


def test_a_pinned_index_covers_its_manifests() -> None:
    pin = f"registry.example:5000/team/app@{INDEX}"
    assert policy("confidential", "any", pin).admit(TAG, [INDEX, MANIFEST]).rule == "pin"


@pytest.mark.parametrize("mode", ["open", "confidential"])
def test_a_pinned_repository_serves_nothing_else(mode: str) -> None:
    with pytest.raises(PolicyDenied) as caught:
        policy(mode, "any", PIN).admit(TAG, [OTHER])
    assert caught.value.reason == "unauthentic-image"


def test_a_digest_reference_does_not_override_the_pins_of_its_repository() -> None:
    reference = Reference.parse(f"registry.example:5000/team/app@{OTHER}")
    with pytest.raises(PolicyDenied):
        policy("confidential", "any", PIN).admit(reference, [OTHER])


def test_pins_of_one_repository_say_nothing_about_another() -> None:
    other = Reference.parse("registry.example:5000/team/other:1")
    with pytest.raises(PolicyDenied):
        policy("confidential", "any", PIN).admit(other, [MANIFEST])


@pytest.mark.parametrize(
    ("mode", "require", "refused"),
    [("open", "any", False), ("open", "sealed", True), ("open", "pinned", False), ("confidential", "any", True)],
)
def test_where_only_sealed_images_run(mode: str, require: str, refused: bool) -> None:
    subject = policy(mode, require)
    if not refused:
        subject.require_sealed(TAG, False, "plain")
        return
    with pytest.raises(PolicyDenied) as caught:
        subject.require_sealed(TAG, False, "plain")
    assert caught.value.reason == "not-sealed"
    subject.require_sealed(TAG, True, "sealed")


def test_a_pin_without_a_digest_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"policy\.pins"):
        policy("open", "any", "registry.example/app:1")
