"""Who wrote an image: every way to pass off another one, against signatures, pins and the secret KEK of the owner."""

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from snapshotter import labels
from snapshotter.build.sign import load_signing_key, sign
from snapshotter.cli.main import main
from snapshotter.config import Limits, Policy, RepositoryRule
from snapshotter.crypto.secret import SecretBytes
from snapshotter.digest import Digest
from snapshotter.errors import (
    ConfigError,
    MalformedImage,
    PolicyDenied,
    RegistryDenied,
    RegistryUnavailable,
    SnapshotterError,
)
from snapshotter.image.origin import ConfiguredTrust, Origin
from snapshotter.image.policy import ImagePolicy
from snapshotter.image.sigstore import SIGNATURE_ANNOTATION, SIGNATURES, CosignSignatures, Found, KeptSignatures, tag_of
from snapshotter.keys.ocicrypt import encrypt_layer
from snapshotter.keys.packet import Kek
from snapshotter.keys.resource import ResourceUri
from snapshotter.registry.layout import OciLayout
from snapshotter.registry.reference import LayoutLocation, Reference
from tests.tamper.attacker import REPOSITORY, Broker, Keys, Node, Registry, World, refused

TAG = f"{REPOSITORY}:app"
KEK = "kbs:///default/image-kek/app"


def trust(tmp: Path, *requirements: dict[str, Any], scope: str = REPOSITORY) -> Policy:
    """A policy.json that rejects everything outside `scope`."""
    path = tmp / "policy.json"
    scopes = {scope: list(requirements)} if requirements else {}
    path.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": scopes}}))
    return Policy(file=str(path))


def signed_by(*keys: Path, identity: str = "matchRepository") -> dict[str, Any]:
    paths = [str(path) for path in keys]
    return {"type": "sigstoreSigned", "keyPaths": paths, "signedIdentity": {"type": identity}}


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("author"), "author")


SECRET = hashlib.sha256(b"app").digest()


@pytest.fixture(scope="module")
def signed(made: World, author: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The honest images, and ones that are signed or wrapped under the owner's KEK."""
    directory = tmp_path_factory.mktemp("signed")
    kek, out = directory / "app.kek", directory / "images"
    kek.write_bytes(SECRET)
    shutil.copytree(made.layout, out)
    jwe, by_kek = ("--recipient", f"jwe:{made.keys.public}"), ("--recipient", f"{KEK}={kek}")
    images = [
        ("signed", 1, *jwe, "--sign-key", author.private),
        ("evil-signed", 2, *jwe, "--sign-key", made.stranger.private),
        ("old", 2, *jwe, "--sign-key", author.private),
        ("twice", 1, *jwe, "--sign-key", author.private, "--sign-key", made.keys.private),
        ("kek", 1, *by_kek, *jwe),
        ("other", 2, *by_kek),
    ]
    for tag, seed, *options in images:
        source = f"oci:{made.layout.parent}/source-{seed}:tiny"
        common = ["convert", source, f"oci:{out}:{tag}", "--repository", REPOSITORY]
        assert main([*common, *map(str, options)]) == 0
    return out


@pytest.fixture
def registry(signed: Path, tmp_path: Path) -> Registry:
    shutil.copytree(signed, tmp_path / "registry")
    return Registry(tmp_path / "registry")


# signatures


@pytest.mark.parametrize("mode", ["open", "confidential"])
async def test_a_signed_image_is_authentic_by_its_tag(
    made: World, registry: Registry, author: Keys, tmp_path: Path, mode: str
) -> None:
    digest = registry.digest("signed")
    node = Node(registry, made.keys.private, tmp_path, mode, rules=trust(tmp_path, signed_by(author.public)))
    assert (await node.prepare(registry, digest, TAG)).kind == "data"


async def test_a_node_restarts_without_the_signatures_in_the_registry(
    made: World, registry: Registry, author: Keys, tmp_path: Path
) -> None:
    digest = registry.digest("signed")
    rules = trust(tmp_path, signed_by(author.public))
    await Node(registry, made.keys.private, tmp_path, "confidential", rules=rules).prepare(registry, digest, TAG)
    offline = Node(Registry(tmp_path / "nothing"), made.keys.private, tmp_path, "confidential", rules=rules)
    assert (await offline.prepare(registry, digest, TAG)).kind == "data"
    for kept in (offline.cache / "documents").glob("*.signatures"):
        kept.write_bytes(kept.read_bytes().replace(b'"signature":"M', b'"signature":"N'))  # of ASN.1, the first byte
    forged = Node(Registry(tmp_path / "nothing"), made.keys.private, tmp_path, "confidential", rules=rules)
    with pytest.raises(SnapshotterError) as caught:
        await forged.prepare(registry, digest, TAG)
    assert caught.value.reason in ("unauthentic-image", "not-found")


async def test_bad_signatures_do_not_hide_a_good_one(
    made: World, registry: Registry, author: Keys, tmp_path: Path
) -> None:
    digest = registry.digest("signed")
    document = registry.manifest(tag_of(digest))
    [good] = document["layers"]
    absent = {"digest": f"sha256:{'0' * 64}"}
    bad = [good | {"digest": "md5:1"}, good | absent, good | {"size": 1}, good | {"annotations": {}}]
    document["layers"] = [*bad, good]
    retag(registry, tag_of(digest), json.dumps(document).encode())
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=trust(tmp_path, signed_by(author.public)))
    assert (await node.prepare(registry, digest, TAG)).kind == "data"


@pytest.mark.parametrize("kind", [RegistryDenied, RegistryUnavailable, MalformedImage])
async def test_a_source_that_fails_does_not_hide_another(
    registry: Registry, author: Keys, tmp_path: Path, kind: type[SnapshotterError]
) -> None:
    class Fails:
        async def find(self, reference: Reference, digest: Digest) -> list[Found]:
            raise kind("fails")

    digest, reference = registry.digest("signed"), Reference.parse(TAG)
    rules = trust(tmp_path, signed_by(author.public))
    found = CosignSignatures(OciLayout(registry.path, Limits()), Limits())
    for sources, admitted in (([Fails(), found], True), ([Fails()], False)):
        origin = Origin(ImagePolicy.of("confidential", rules), Limits(), ConfiguredTrust(rules.file, None), sources)
        if admitted:
            assert (await origin.admit(reference, [digest])).authentic
            continue
        with pytest.raises(RegistryUnavailable if kind is RegistryUnavailable else PolicyDenied, match="fails"):
            await origin.admit(reference, [digest])


async def test_kept_signatures_add_up(tmp_path: Path) -> None:
    """Of one digest in two repositories, or of two requirements."""
    kept, digest = KeptSignatures(tmp_path), Digest.of(b"x")
    one, two = Found(b"one", b"1"), Found(b"two", b"2")
    for found in (one, two, one):
        await kept.keep(digest, found)
    assert sorted(await kept.find(None, digest)) == [one, two]
    for number in range(2 * SIGNATURES):
        await kept.keep(digest, Found(b"%d" % number, b""))
    assert len(await kept.find(None, digest)) == SIGNATURES


async def test_signing_leaves_the_signatures_of_others_as_they_are(registry: Registry, made: World) -> None:
    digest = registry.digest("signed")
    before = registry.manifest(tag_of(digest))
    theirs = registry.put(b"{}") | {"mediaType": "application/vnd.dsse.envelope.v1+json"}
    keyless = before["layers"][0] | {"annotations": {"dev.sigstore.cosign/certificate": "PEM"}}
    before["layers"] = [*before["layers"], theirs, keyless]
    retag(registry, tag_of(digest), json.dumps(before).encode())
    location = LayoutLocation(registry.path, None, digest).reference
    key = load_signing_key(made.keys.private)
    for _ in range(2):
        await sign(OciLayout(registry.path, Limits()), location, digest, REPOSITORY, [key], Limits())
    after = registry.manifest(tag_of(digest))
    assert after["layers"][:-1] == before["layers"]
    assert set(after["layers"][-1]["annotations"]) == {SIGNATURE_ANNOTATION}
    assert len(json.loads(registry.blob(after["config"]["digest"]))["rootfs"]["diff_ids"]) == 2


async def test_an_unsigned_tag(made: World, registry: Registry, author: Keys, tmp_path: Path) -> None:
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=trust(tmp_path, signed_by(author.public)))
    error = await refused(node, registry, registry.digest("app"), "unauthentic-image", reference=TAG)
    assert "it has no signature" in str(error)


async def test_sealed_again_by_a_stranger_to_the_same_public_key(
    made: World, registry: Registry, author: Keys, tmp_path: Path
) -> None:
    """Anybody can encrypt to our key and sign with a key of his own."""
    evil = registry.digest("evil-signed")
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=trust(tmp_path, signed_by(author.public)))
    error = await refused(node, registry, evil, "unauthentic-image", reference=TAG)
    assert "not by a trusted key" in str(error)


async def test_the_signature_of_another_digest(made: World, registry: Registry, author: Keys, tmp_path: Path) -> None:
    good = registry.digest("signed")
    rename_tag(registry, tag_of(good), tag_of(registry.digest("evil")))
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=trust(tmp_path, signed_by(author.public)))
    error = await refused(node, registry, registry.digest("evil"), "unauthentic-image", reference=TAG)
    assert f"for another manifest, {good}" in str(error)


async def test_a_signed_image_of_another_repository(
    made: World, registry: Registry, author: Keys, tmp_path: Path
) -> None:
    digest = registry.digest("signed")
    rules = trust(tmp_path, signed_by(author.public), scope="registry.example")
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=rules)
    error = await refused(node, registry, digest, "unauthentic-image", reference="registry.example/team/other:1")
    assert "which matchRepository does not accept" in str(error)


@pytest.mark.parametrize("position", range(0, 60, 7))
async def test_a_changed_claim_or_signature(
    made: World, registry: Registry, author: Keys, tmp_path: Path, position: int
) -> None:
    digest = registry.digest("signed")
    document = registry.manifest(tag_of(digest))
    [layer] = document["layers"]
    if position % 2:
        payload = bytearray(registry.blob(layer["digest"]))
        payload[position] ^= 1
        layer |= registry.put(bytes(payload))
    else:
        raw = bytearray(base64.b64decode(layer["annotations"][SIGNATURE_ANNOTATION]))
        raw[position] ^= 1
        layer["annotations"][SIGNATURE_ANNOTATION] = base64.b64encode(raw).decode()
    retag(registry, tag_of(digest), json.dumps(document).encode())
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=trust(tmp_path, signed_by(author.public)))
    await refused(node, registry, digest, "unauthentic-image", reference=TAG)


async def test_two_signatures_where_two_are_required(
    made: World, registry: Registry, author: Keys, tmp_path: Path
) -> None:
    digest = registry.digest("signed")
    rules = trust(tmp_path, signed_by(author.public), signed_by(made.keys.public))
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=rules)
    await refused(node, registry, digest, "unauthentic-image", reference=TAG)
    digest = registry.digest("twice")
    assert (await node.prepare(registry, digest, TAG)).kind == "data"


async def test_a_rejected_scope_refuses_what_is_signed(
    made: World, registry: Registry, author: Keys, tmp_path: Path
) -> None:
    digest = registry.digest("signed")
    node = Node(registry, made.keys.private, tmp_path, rules=trust(tmp_path))
    error = await refused(node, registry, digest, "unauthentic-image")
    assert "rejected by the trust policy, scope 'default'" in str(error)


async def test_accepting_anything_makes_nothing_authentic(made: World, registry: Registry, tmp_path: Path) -> None:
    rules = trust(tmp_path, {"type": "insecureAcceptAnything"})
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=rules)
    await refused(node, registry, registry.digest("app"), "unauthentic-image", reference=TAG)
    assert (
        await Node(registry, made.keys.private, tmp_path, rules=rules).prepare(registry, registry.digest("app"))
    ).kind


@pytest.mark.parametrize("content", ["", "{}", '{"default": [{"type": "signedBySomebody"}]}'])
async def test_without_a_readable_policy_no_image_runs(
    made: World, registry: Registry, author: Keys, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    for name in (path, tmp_path / "missing.json"):
        await no_image_runs(made, registry, tmp_path, Policy(file=str(name)))


async def no_image_runs(made: World, registry: Registry, tmp_path: Path, rules: Policy) -> None:
    node = Node(registry, made.keys.private, tmp_path, rules=rules)
    with pytest.raises(ConfigError):
        await node.prepare(registry, registry.digest("app"))
    node.assert_nothing_left()


async def test_a_signature_does_not_replace_a_pin(
    made: World, registry: Registry, author: Keys, tmp_path: Path
) -> None:
    """An older image of the same author is signed as well; a pin says which one it has to be."""
    old = registry.digest("old")
    rules = trust(tmp_path, signed_by(author.public))
    assert (await Node(registry, made.keys.private, tmp_path, rules=rules).prepare(registry, old, TAG)).kind == "data"
    pinned = Policy(file=rules.file, pins=(f"{REPOSITORY}@{registry.digest('app')}",))
    node = Node(registry, made.keys.private, tmp_path / "pinned", "confidential", rules=pinned)
    error = await refused(node, registry, old, "unauthentic-image", reference=TAG)
    assert "not one of the pins" in str(error)


# the secret KEK of the owner


def only_by_kek() -> Policy:
    return Policy(repositories=(RepositoryRule(name=REPOSITORY, recipients=(KEK,), secret_kek=True),))


async def test_an_image_under_the_owners_kek_is_authentic(made: World, registry: Registry, tmp_path: Path) -> None:
    node = Node(registry, None, tmp_path, "confidential", rules=only_by_kek(), broker=Broker({KEK: SECRET}))
    assert (await node.prepare(registry, registry.digest("kek"), TAG)).kind == "data"


async def test_the_public_key_opens_nothing_where_the_kek_counts(
    made: World, registry: Registry, tmp_path: Path
) -> None:
    """Sealed by a stranger: a genuine packet of another image beside his own, which our private key would open."""
    genuine = registry.manifest("kek")["layers"][-1]["annotations"]
    name = labels.ENC_KEYS_PREFIX + "provider.attestation-agent"

    def add_packet(manifest: dict[str, Any], _config: dict[str, Any]) -> None:
        manifest["layers"][-1]["annotations"][name] = genuine[name]

    evil = registry.forge("evil", add_packet)
    rules, resources = only_by_kek(), {KEK: SECRET}
    node = Node(registry, made.keys.private, tmp_path, "confidential", rules=rules, broker=Broker(resources))
    await refused(node, registry, evil, "layer-hmac", reference=TAG)
    await refused(node, registry, registry.digest("evil"), "unauthentic-image", reference=TAG)


async def test_swapped_config_and_bootstrap_under_the_kek(made: World, registry: Registry, tmp_path: Path) -> None:

    def swap_entrypoint(_manifest: dict[str, Any], config: dict[str, Any]) -> None:
        config["config"]["Entrypoint"] = ["/bin/evil"]

    def swap_bootstrap(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        manifest["layers"][-1] = registry.manifest("other")["layers"][-1]
        config["rootfs"]["diff_ids"][-1] = manifest["layers"][-1]["digest"]

    node = Node(registry, None, tmp_path, "confidential", rules=only_by_kek(), broker=Broker({KEK: SECRET}))
    swapped = registry.forge("kek", swap_entrypoint)
    await refused(node, registry, swapped, "config-mismatch", reference=TAG)
    swapped = registry.forge("kek", swap_bootstrap)
    await refused(node, registry, swapped, "identity-mismatch", reference=TAG)


@pytest.mark.parametrize("require", ["any", "pinned"])
async def test_a_plain_layer_upon_an_image_under_the_kek(
    made: World, registry: Registry, tmp_path: Path, require: str
) -> None:
    """The KEK says who made the sealed layers; a layer upon them replaces their files and may be anybody's."""

    def add_layer(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        layer = registry.put(bytes(10240))
        manifest["layers"].append({"mediaType": "application/vnd.oci.image.layer.v1.tar", **layer})
        config["rootfs"]["diff_ids"].append(layer["digest"])

    evil = registry.forge("kek", add_layer)
    rules = Policy(require=require, repositories=only_by_kek().repositories)  # type: ignore[arg-type]
    node = Node(registry, None, tmp_path, rules=rules, broker=Broker({KEK: SECRET}))
    top = len(registry.manifest("kek")["layers"])
    with pytest.raises(SnapshotterError) as caught:
        await node.prepare(registry, evil, TAG, layer=top)
    assert caught.value.reason == "not-sealed"


async def test_an_encrypted_bootstrap_of_chunks_that_are_not_sealed(
    made: World, registry: Registry, tmp_path: Path
) -> None:
    """It has no identity, so its config may be anybody's, whoever made the bootstrap."""
    wrapper = Kek(ResourceUri.parse(KEK), SecretBytes(SECRET))
    plain = registry.manifest("plain")["layers"][-1]
    cipher, annotations = encrypt_layer(registry.blob(plain["digest"]), [wrapper, made.keys.public.read_bytes()])

    def swap(manifest: dict[str, Any], _config: dict[str, Any]) -> None:
        top = manifest["layers"][-1]
        top |= registry.put(cipher) | {"mediaType": top["mediaType"] + labels.ENCRYPTED_SUFFIX}
        top["annotations"] |= annotations

    image = registry.forge("plain", swap)
    for number, rule in enumerate((RepositoryRule(name=REPOSITORY, sealed=True), only_by_kek().repositories[0])):
        rules = Policy(repositories=(rule,))
        node = Node(registry, made.keys.private, tmp_path / str(number), rules=rules, broker=Broker({KEK: SECRET}))
        await refused(node, registry, image, "not-sealed", reference=TAG)
    top = len(registry.manifest("plain")["layers"]) - 1
    node = Node(registry, made.keys.private, tmp_path)
    assert (await node.prepare(registry, image, TAG, layer=top)).kind == "image"


async def test_an_image_that_is_not_encrypted_where_recipients_are_required(
    made: World, registry: Registry, tmp_path: Path
) -> None:
    def drop_all(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        layer = registry.put(bytes(10240))
        manifest["layers"] = [{"mediaType": "application/vnd.oci.image.layer.v1.tar", **layer}]
        config["rootfs"]["diff_ids"] = [layer["digest"]]

    def borrow_packets(manifest: dict[str, Any], _config: dict[str, Any]) -> None:
        manifest["layers"][-1]["annotations"] |= registry.manifest("kek")["layers"][-1]["annotations"]

    ordinary = registry.forge("plain", drop_all)
    for wanted in ({"recipients": (KEK,)}, {"ciphers": ("A256GCM",)}):
        rules = Policy(repositories=(RepositoryRule(name=REPOSITORY, **wanted),))  # type: ignore[arg-type]
        node = Node(registry, made.keys.private, tmp_path, rules=rules, broker=Broker({KEK: SECRET}))
        for image in (ordinary, registry.digest("plain"), registry.forge("plain", borrow_packets)):
            await refused(node, registry, image, "wrapping", reference=TAG)


async def test_a_policy_that_changes_counts_for_the_next_pull(
    made: World, registry: Registry, author: Keys, tmp_path: Path
) -> None:
    """Also for an image whose verdict is still remembered, and for a key that is taken back."""
    digest = registry.digest("signed")
    key = tmp_path / "trusted.pub"
    shutil.copy(author.public, key)
    node = Node(registry, made.keys.private, tmp_path, rules=trust(tmp_path, signed_by(key)))
    assert (await node.prepare(registry, digest, TAG)).kind == "data"
    shutil.copy(made.stranger.public, key)
    with pytest.raises(SnapshotterError) as caught:
        await node.prepare(registry, digest, TAG)
    assert caught.value.reason == "unauthentic-image"
    shutil.copy(author.public, key)
    assert (await node.prepare(registry, digest, TAG)).kind == "data"
    trust(tmp_path)
    with pytest.raises(SnapshotterError) as caught:
        await node.prepare(registry, digest, TAG)
    assert caught.value.reason == "unauthentic-image"


# what stands in the registry under another tag


def retag(registry: Registry, tag: str, manifest: bytes) -> None:
    stored = registry.put(manifest)
    index = json.loads((registry.path / "index.json").read_bytes())
    for entry in index["manifests"]:
        if entry["annotations"]["org.opencontainers.image.ref.name"] == tag:
            entry |= stored
    (registry.path / "index.json").write_text(json.dumps(index))


def rename_tag(registry: Registry, old: str, new: str) -> None:
    path = registry.path / "index.json"
    path.write_text(path.read_text().replace(old, new))
