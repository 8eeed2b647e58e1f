"""containers-policy.json: which scope counts, whom a signature may name, and that half-known policies are refused."""

import base64
import json
from typing import Any

import pytest

from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError
from snapshotter.image.origin import ConfiguredTrust
from snapshotter.image.trustpolicy import Identity, Signed, TrustPolicy
from snapshotter.keys.resource import ResourceUri
from snapshotter.registry.reference import Reference

ACCEPT, REJECT = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}]
COSIGN = {"type": "sigstoreSigned", "keyPath": "/keys/cosign.pub"}
DIGEST = "sha256:" + "a" * 64


def parse(document: Any) -> TrustPolicy:
    return TrustPolicy.parse(document if isinstance(document, bytes) else json.dumps(document).encode(), "test")


def test_the_most_specific_scope_counts() -> None:
    scopes = [
        "registry.example:5000/team/app:1", f"registry.example:5000/team/app@{DIGEST}",
        "registry.example:5000/team/app", "registry.example:5000/team", "registry.example:5000", "*.example", "",
        "docker.io", "docker.io/someone", "docker.io/library/alpine", "localhost/app", "[::1]:5000",
    ]  # fmt: skip
    policy = parse({"default": REJECT, "transports": {"docker": dict.fromkeys(scopes, ACCEPT)}})
    cases = {
        "registry.example:5000/team/app:1": "registry.example:5000/team/app:1",
        f"registry.example:5000/team/app@{DIGEST}": f"registry.example:5000/team/app@{DIGEST}",
        "registry.example:5000/team/app": "registry.example:5000/team/app",  # means :latest, which has no scope
        "registry.example:5000/team/app:2": "registry.example:5000/team/app",
        "registry.example:5000/team/more/app:1": "registry.example:5000/team",
        "registry.example:5000/teams/app:1": "registry.example:5000",
        "other.example/app": "*.example",
        "deep.other.example/app": "*.example",
        "busybox": "docker.io",
        "someone/app": "docker.io/someone",
        "alpine:3": "docker.io/library/alpine",
        "localhost/app": "localhost/app",
        "[::1]:5000/app": "[::1]:5000",
        "other.test/app": "",
    }
    for reference, scope in cases.items():
        assert policy.rule(Reference.parse(reference)).scope == f"docker:{scope}", reference


def test_images_outside_every_scope_get_the_default() -> None:
    policy = parse({"default": REJECT, "transports": {"docker": {"registry.example": ACCEPT}, "dir": {"": ACCEPT}}})
    assert policy.rule(Reference.parse("other.example/app")).requirements == ("reject",)


@pytest.mark.parametrize(
    "scope",
    ["busybox", "library/busybox", "docker.io/busybox:1", "index.docker.io/library/busybox", "Registry.example",
     "Registry.example/app", "registry.example/App", "registry.example/", "*", "*.Example", "*example", "x.example/a b",
     "registry.example/app:", "registry.example/app@sha256:12"],
)  # fmt: skip
def test_a_scope_that_could_never_match_is_refused(scope: str) -> None:
    with pytest.raises(ConfigError, match="policy test: "):
        parse({"default": ACCEPT, "transports": {"docker": {scope: REJECT}}})


def test_keys_by_name_and_by_content() -> None:
    inline = base64.b64encode(b"PEM").decode()
    requirements = [
        COSIGN,
        {**COSIGN, "keyPath": "kbs:///default/key/1"},
        {"type": "sigstoreSigned", "keyData": inline},
    ]
    requirements.append({"type": "signedBy", "keyType": "GPGKeys", "keyPaths": ["/a.gpg", "/b.gpg"]})
    found = parse({"default": requirements}).rule(Reference.parse("x.example/y")).requirements
    keys = [item.keys for item in found if isinstance(item, Signed)]
    assert keys == [("/keys/cosign.pub",), ("kbs:///default/key/1",), (b"PEM",), ("/a.gpg", "/b.gpg")]


@pytest.mark.parametrize(
    ("kind", "names", "wanted", "stated", "accepted"),
    [
        ("matchRepoDigestOrExact", (), "r.example/app:1", "r.example/app:1", True),
        ("matchRepoDigestOrExact", (), "r.example/app:1", "r.example/app:2", False),
        ("matchRepoDigestOrExact", (), "r.example/app:1", "r.example/app", False),
        ("matchRepoDigestOrExact", (), "r.example/app", "r.example/app:latest", True),
        ("matchRepoDigestOrExact", (), f"r.example/app@{DIGEST}", "r.example/app:2", True),
        ("matchRepoDigestOrExact", (), f"r.example/app@{DIGEST}", "r.example/other:2", False),
        ("matchExact", (), "r.example/app:1", "r.example/app:1", True),
        ("matchExact", (), f"r.example/app@{DIGEST}", "r.example/app:1", False),
        ("matchRepository", (), "r.example/app:1", "r.example/app", True),
        ("matchRepository", (), "r.example/app:1", "r.example/app:9", True),
        ("matchRepository", (), "r.example/app:1", "r.example/app/x", False),
        ("exactReference", ("r.example/app:7",), "mirror.example/z:1", "r.example/app:7", True),
        ("exactReference", ("r.example/app:7",), "r.example/app:7", "r.example/app:8", False),
        ("exactRepository", ("r.example/app",), "mirror.example/z:1", "r.example/app:3", True),
        ("exactRepository", ("r.example/app",), "r.example/app:1", "mirror.example/z:1", False),
        ("remapIdentity", ("m.example/copy", "r.example"), "m.example/copy/app:1", "r.example/app:1", True),
        ("remapIdentity", ("m.example/copy", "r.example"), "m.example/copying/app:1", "r.example/app:1", False),
        ("matchRepository", (), "r.example/app:1", "not a reference", False),
    ],
)
def test_whom_a_signature_must_name(
    kind: Any, names: tuple[str, ...], wanted: str, stated: str, accepted: bool
) -> None:
    assert Identity(kind, names).accepts(Reference.parse(wanted), stated) is accepted


@pytest.mark.parametrize(
    "document",
    [
        b"", b"[]", b"{", b'{"default": [{"type":"reject"}], "default": []}', {}, {"default": []}, {"default": {}},
        {"default": [{}]}, {"default": [{"type": "signed"}]}, {"default": [{"type": "reject", "more": 1}]},
        {"default": REJECT, "transport": {}}, {"default": REJECT, "transports": {"docker": {"x": []}}},
        {"default": REJECT, "transports": {"docker": {"x": ["reject"]}}},
        {"default": [{"type": "sigstoreSigned"}]},
        {"default": [{**COSIGN, "keyData": "AAAA"}]},
        {"default": [{"type": "sigstoreSigned", "keyData": "%"}]},
        {"default": [{"type": "sigstoreSigned", "keyPaths": []}]},
        {"default": [{**COSIGN, "rekorPublicKeyPath": "/rekor.pub"}]},
        {"default": [{"type": "sigstoreSigned", "fulcio": {"caPath": "/ca", "oidcIssuer": "x", "subjectEmail": "y"}}]},
        {"default": [{**COSIGN, "signedIdentity": {"type": "matchAnything"}}]},
        {"default": [{**COSIGN, "signedIdentity": {"type": "exactReference"}}]},
        {"default": [{**COSIGN, "signedIdentity": {"type": "exactReference", "dockerReference": "not one!"}}]},
        {"default": [{"type": "signedBy", "keyType": "X509", "keyPath": "/x"}]},
        {"default": [{"type": "signedBy", "keyType": "GPGKeys"}]},
        b'{"default": [{"type":"reject"}]' + b" " * (1 << 20) + b"}",
    ],
)  # fmt: skip
def test_a_policy_that_is_not_wholly_understood_is_refused(document: Any) -> None:
    with pytest.raises(ConfigError, match="policy test: "):
        parse(document)


@pytest.mark.parametrize("path", ["/a\0b", "/\ud800", "", ".", "kbs:///a", "kbs:///a/b/\ud800", "/dev/zero"])
async def test_a_key_of_a_name_that_is_none_is_an_error_of_the_configuration(path: str) -> None:
    """Names are JSON strings, which may hold anything."""
    with pytest.raises(ConfigError, match="policy: "):
        await ConfiguredTrust("/unused", NoResources()).key(path)
    with pytest.raises(ConfigError, match="policy: "):
        await ConfiguredTrust(path, NoResources()).policy()


class NoResources:
    async def get(self, uri: ResourceUri) -> SecretBytes:
        raise AssertionError(uri)


def test_a_policy_cut_anywhere_is_refused() -> None:
    whole = json.dumps({"default": REJECT, "transports": {"docker": {"registry.example": [COSIGN]}}}).encode()
    parse(whole)
    for length in range(len(whole)):
        with pytest.raises(ConfigError, match="policy test: "):
            parse(whole[:length])
