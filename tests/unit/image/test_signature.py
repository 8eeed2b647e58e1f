"""What a signature claims and whether a key made it."""

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from snapshotter.digest import Digest
from snapshotter.errors import ConfigError, SnapshotterError
from snapshotter.image.signature import CLAIM_BYTES, COSIGN, SIMPLE, Claim, is_signed_by, load_public_key

MANIFEST = Digest("sha256:" + "1" * 64)


def claim(**changes: Any) -> dict[str, Any]:
    critical = {
        "type": COSIGN, "image": {"docker-manifest-digest": MANIFEST},
        "identity": {"docker-reference": "r.example/app"},
    }  # fmt: skip
    return {"critical": critical | changes, "optional": None}


def test_a_claim_reads_as_it_was_written() -> None:
    written = Claim(MANIFEST, "r.example/app")
    assert Claim.parse(written.pack(COSIGN), COSIGN) == written
    assert json.loads(written.pack(COSIGN)) == claim()


@pytest.mark.parametrize(
    "document",
    [
        {}, [], {"critical": {}}, claim(type=SIMPLE), claim(type=None), claim(image={}), claim(identity={}),
        claim(image={"docker-manifest-digest": "sha512:" + "1" * 128}),
        claim(image={"docker-manifest-digest": MANIFEST, "more": 1}), claim(more=1),
        claim(identity={"docker-reference": 7}), claim() | {"more": 1},
        claim() | {"optional": "x" * CLAIM_BYTES},
    ],
)  # fmt: skip
def test_a_claim_that_is_not_wholly_understood_is_refused(document: Any) -> None:
    with pytest.raises(SnapshotterError):
        Claim.parse(json.dumps(document).encode(), COSIGN)


def pem(key: Any) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[no-any-return]


def test_keys_of_every_kind_verify_and_refuse() -> None:
    payload = Claim(MANIFEST, "r.example/app").pack(COSIGN)
    curves = [ec.generate_private_key(curve) for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())]
    rsa_key, edwards = rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()
    made = [(key, key.sign(payload, ec.ECDSA(hashes.SHA256()))) for key in curves]
    signatures = [*made, (rsa_key, rsa_key.sign(payload, padding.PKCS1v15(), hashes.SHA256()))]
    signatures.append((edwards, edwards.sign(payload)))
    for key, signature in signatures:
        public = load_public_key(pem(key), "test")
        assert is_signed_by(payload, signature, public)
        assert not is_signed_by(payload + b" ", signature, public)
        assert not is_signed_by(payload, signature[:-1], public)
        assert not is_signed_by(payload, b"", public)
        for other, foreign in signatures:
            assert is_signed_by(payload, foreign, public) is (other is key)


@pytest.mark.parametrize(
    "key",
    [
        b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"x" * (1 << 17),
        pem(rsa.generate_private_key(65537, 1024)), pem(ec.generate_private_key(ec.SECP256K1())),
        pem(dsa.generate_private_key(2048)),
    ],
)  # fmt: skip
def test_keys_that_may_not_sign_images(key: bytes) -> None:
    with pytest.raises(ConfigError, match="signing key test"):
        load_public_key(key, "test")
