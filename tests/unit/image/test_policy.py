"""Who may run here: every way step 0 of the order of trust can end."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from snapshotter import labels
from snapshotter.config import Limits, Policy, RepositoryRule
from snapshotter.crypto.secret import SecretBytes
from snapshotter.digest import Digest
from snapshotter.errors import BadReference, ConfigError, PolicyDenied
from snapshotter.image.policy import ImagePolicy
from snapshotter.keys import jwe, packet
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


# rules for repositories

PUBLIC = (
    ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
)
KEK = "kbs:///default/image-kek/app"

LONG_KEK = "kbs:///default/image-kek/".ljust(512, "a")


def with_rules(*rules: dict[str, object], mode: str = "open") -> ImagePolicy:
    return ImagePolicy.of(mode, Policy(repositories=tuple(RepositoryRule(**rule) for rule in rules)))  # type: ignore[arg-type]


def test_the_longest_name_counts() -> None:
    subject = with_rules({"name": "registry.example:5000"}, {"name": "registry.example:5000/team", "sealed": True})
    subject.require_sealed(Reference.parse("registry.example:5000/teams/app:1"), False, "plain")
    with pytest.raises(PolicyDenied) as caught:
        subject.require_sealed(TAG, False, "plain")
    assert caught.value.reason == "not-sealed"


def test_a_repository_whose_images_must_be_authentic() -> None:
    subject = with_rules({"name": "registry.example:5000/team/app", "authentic": True})
    with pytest.raises(PolicyDenied) as caught:
        subject.admit(TAG, [MANIFEST])
    assert caught.value.reason == "unauthentic-image"
    assert subject.admit(BY_DIGEST, [MANIFEST]).authentic


def packets(*wrapped: tuple[str, str]) -> dict[str, str]:
    raw = [json.dumps({"kid": kid, "wrapped_data": "", "iv": "", "wrap_type": kind}) for kid, kind in wrapped]
    return {packet.ANNOTATION: ",".join(base64.b64encode(text.encode()).decode() for text in raw)}


JWE = {labels.ENC_KEYS_JWE: base64.b64encode(jwe.wrap(SecretBytes(b"{}"), [PUBLIC])).decode()}


@pytest.mark.parametrize(
    ("rule", "annotations", "reason"),
    [
        ({"recipients": (KEK,)}, packets((KEK, "A256GCM")), ""),
        ({"recipients": (KEK,)}, JWE, "wrapping"),
        ({"recipients": (KEK, KEK + "2")}, packets((KEK, "A256GCM")), "wrapping"),
        ({"ciphers": ("A256GCM",)}, packets((KEK, "A256GCM")), ""),
        ({"ciphers": ("A256GCM",)}, packets((KEK, "A256CTR")), "wrapping"),
        ({"ciphers": ("A256GCM",)}, JWE, "wrapping"),
        ({"ciphers": ("ECDH-ES+A256KW",)}, JWE, ""),
        ({"recipients": (KEK,), "secret_kek": True}, packets((KEK, "A256GCM")), ""),
        ({"recipients": (KEK,), "secret_kek": True}, packets(("kbs://host:8080/default/image-kek/app", "A256GCM")), ""),
        ({"recipients": (KEK,), "secret_kek": True}, packets((KEK, "A256CTR")), "unauthentic-image"),
        ({"recipients": (KEK,), "secret_kek": True}, JWE, "unauthentic-image"),
        ({"recipients": (KEK,), "secret_kek": True}, {}, "unauthentic-image"),
    ],
)
def test_how_the_key_of_an_image_is_wrapped(rule: dict[str, object], annotations: dict[str, str], reason: str) -> None:
    subject = with_rules({"name": "registry.example:5000/team/app", **rule})
    admission = subject.admit(TAG, [MANIFEST])
    if not reason:
        passed = subject.check_wrapping(TAG, admission, annotations, Limits())
        assert passed.authentic is bool(rule.get("secret_kek"))
        assert passed.usable(annotations, Limits()) == annotations
        return
    with pytest.raises(PolicyDenied) as caught:
        subject.check_wrapping(TAG, admission, annotations, Limits())
    assert caught.value.reason == reason


def test_where_only_the_secret_kek_counts_nothing_else_opens_the_image() -> None:
    subject = with_rules({"name": "registry.example:5000", "recipients": (KEK,), "secret_kek": True})
    both = packets((KEK, "A256GCM"), ("kbs:///default/image-kek/public", "A256GCM"), (KEK, "A256CTR")) | JWE
    admission = subject.check_wrapping(
        TAG, subject.admit(TAG, [MANIFEST]), both | {labels.ENC_PUBOPTS: "e30="}, Limits()
    )
    usable = admission.usable(both | {labels.ENC_PUBOPTS: "e30="}, Limits())
    assert usable == packets((KEK, "A256GCM")) | {labels.ENC_PUBOPTS: "e30="}


@pytest.mark.parametrize(
    "rules",
    [
        [{"name": ""}], [{"name": "team/app"}], [{"name": "registry.example/"}], [{"name": "registry.example/Team"}],
        [{"name": "registry.example"}, {"name": "registry.example"}],
        [{"name": "registry.example", "recipients": ("jwe:x.pem",)}],
        [{"name": "registry.example", "secret_kek": True}],
        [{"name": "registry.example", "secret_kek": True, "recipients": (KEK,), "ciphers": ("PKCS7",)}],
    ],
)  # fmt: skip
def test_rules_that_cannot_be_kept_are_configuration_errors(rules: list[dict[str, object]]) -> None:
    with pytest.raises((ConfigError, BadReference)):
        with_rules(*rules)


@pytest.mark.parametrize(
    "changes",
    [
        {"provider": "aliyun", "provider_settings": {"client_type": "client_key"}},
        {"provider": None},
        {"provider": ["kbs"]},
        {"kid": LONG_KEK + "x"},
        {"kid": [KEK]},
        {"wrap_type": ["A256GCM"]},
    ],
)
def test_a_packet_that_another_reader_would_take_for_something_else_is_not_under_the_kek(
    changes: dict[str, object],
) -> None:
    """A Confidential Data Hub opens packets of other key services, whose keys anybody may have."""
    subject = with_rules({"name": "registry.example:5000", "recipients": (LONG_KEK, KEK), "secret_kek": True})
    foreign = {"kid": KEK, "wrapped_data": "", "iv": "", "wrap_type": "A256GCM", "version": "0.1.0"} | changes
    both = packets((KEK, "A256GCM"), (LONG_KEK, "A256GCM"))
    good = both[packet.ANNOTATION]
    both[packet.ANNOTATION] += "," + base64.b64encode(json.dumps(foreign).encode()).decode()
    admission = subject.check_wrapping(TAG, subject.admit(TAG, [MANIFEST]), both, Limits())
    assert admission.usable(both, Limits()) == {packet.ANNOTATION: good}
