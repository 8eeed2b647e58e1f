"""Sealed secrets: what opens, and that nothing in one can be changed."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import KeyDenied
from snapshotter.keys.resource import ResourceUri
from snapshotter.keys.sealed import unseal

SIGNER, NAME = "kbs:///default/signing-key/author", "kbs:///default/credential/app"
KEY = ec.generate_private_key(ec.SECP256R1())
HEADER = {"alg": "ES256", "kid": SIGNER}
PAYLOAD = {
    "version": "0.1.0", "type": "vault", "name": NAME, "provider": "kbs", "provider_settings": {}, "annotations": {},
}  # fmt: skip


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def jwk(key: ec.EllipticCurvePrivateKey = KEY, **changes: Any) -> bytes:
    point = key.public_key().public_numbers()
    x, y = (b64(number.to_bytes(32, "big")) for number in (point.x, point.y))
    return json.dumps({"kty": "EC", "crv": "P-256", "x": x, "y": y} | changes).encode()


def sealed(header: Any = HEADER, payload: Any = PAYLOAD, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    signed = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(payload).encode())}"
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"sealed.{signed}.{b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


class Broker:
    def __init__(self, signer: bytes) -> None:
        self.held = {SIGNER: signer, NAME: b"the secret", "kbs:///default/credential/other": b"another"}
        self.asked: list[str] = []

    async def get(self, uri: ResourceUri) -> SecretBytes:
        self.asked.append(str(uri))
        return SecretBytes(self.held[str(uri)])


async def test_a_sealed_secret_opens() -> None:
    assert (await unseal(sealed() + "\n", Broker(jwk()))).expose() == b"the secret"


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        ({"alg": "none", "kid": SIGNER}, PAYLOAD), ({"alg": "HS256", "kid": SIGNER}, PAYLOAD),
        ({"alg": "ES256"}, PAYLOAD), (HEADER | {"crit": ["x"]}, PAYLOAD), (HEADER | {"kid": "file:///x"}, PAYLOAD),
        ([], PAYLOAD), (HEADER, []), (HEADER, {}), (HEADER, PAYLOAD | {"type": "envelope"}),
        (HEADER, PAYLOAD | {"version": "0.2.0"}), (HEADER, PAYLOAD | {"provider": "aliyun"}),
        (HEADER, PAYLOAD | {"name": "kbs:///x"}), (HEADER, PAYLOAD | {"name": 7}), (HEADER, PAYLOAD | {"more": 1}),
        (HEADER, PAYLOAD | {"annotations": None}),
    ],
)  # fmt: skip
async def test_what_is_not_wholly_understood_is_refused_before_anybody_is_asked(header: Any, payload: Any) -> None:
    broker = Broker(jwk())
    with pytest.raises(KeyDenied, match="sealed secret"):
        await unseal(sealed(header, payload), broker)
    assert not broker.asked


async def test_every_changed_character_is_noticed() -> None:
    text = sealed()
    for at in range(len("sealed."), len(text)):
        changed = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        broker = Broker(jwk())
        with pytest.raises((KeyDenied, KeyError)):  # KeyError: another signer, whom this broker does not know
            await unseal(changed, broker)
        assert NAME not in broker.asked


@pytest.mark.parametrize("text", ["", "sealed", "sealed...", "sealed.a.b", f"unsealed{sealed()[6:]}", "x" * (1 << 17)])
async def test_what_is_none(text: str) -> None:
    with pytest.raises(KeyDenied):
        await unseal(text, Broker(jwk()))


@pytest.mark.parametrize(
    "signer",
    [
        b"", b"{}", jwk(ec.generate_private_key(ec.SECP256R1())), jwk(crv="P-384"), jwk(kty="RSA"), jwk(d="AAAA"),
        jwk(x="AAAA"), jwk(x=b64(bytes(32))),
    ],
)  # fmt: skip
async def test_another_key_or_none(signer: bytes) -> None:
    broker = Broker(signer or b" ")
    with pytest.raises(KeyDenied):
        await unseal(sealed(), broker)
    assert NAME not in broker.asked
