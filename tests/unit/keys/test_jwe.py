"""JWE packets: a standard's example, our own, another library's, and everything that must not be read."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jwcrypto.jwe import JWE
from jwcrypto.jwk import JWK

from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, KeyDenied, LimitExceeded, MalformedImage, SnapshotterError
from snapshotter.keys import jwe
from tests.unit.keys.conftest import Pair

PAYLOAD = b'{"symkey":"canary"}'
KINDS = pytest.mark.parametrize("kind", ["rsa-2048", "rsa-4096", "p-256", "p-384", "p-521"])


def load(pair: Pair) -> jwe.PrivateKey:
    return jwe.PrivateKey.load(pair.private.read_bytes())


def b64u(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def header_of(packet: dict[str, Any]) -> dict[str, Any]:
    text = packet["protected"]
    header: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return header


VECTORS = Path(__file__).parents[2] / "vectors"


def test_the_example_of_rfc_7516_appendix_a_1() -> None:
    example = json.loads((VECTORS / "rfc7516-a1.json").read_text())
    jwk = JWK(**example["key"])
    key = jwe.PrivateKey.load(jwk.export_to_pem(private_key=True, password=None))
    assert key.kid == jwk.thumbprint()
    assert jwe.unwrap(json.dumps(example["packet"]).encode(), [key]).expose() == example["plaintext"].encode()


def test_key_ids_are_rfc_7638_thumbprints(pairs: dict[str, Pair]) -> None:
    numbers = pairs["p-256"].key.public_key().public_numbers()
    assert isinstance(numbers, ec.EllipticCurvePublicNumbers)
    x, y = (b64u(value.to_bytes(32, "big")) for value in (numbers.x, numbers.y))
    canonical = f'{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}'
    assert load(pairs["p-256"]).kid == b64u(hashlib.sha256(canonical.encode()).digest())


def test_the_concat_kdf_example_of_rfc_7518_appendix_c() -> None:
    shared = bytes.fromhex("9e56d91d817135d372834283bf84269cfb316ea3da806a48f6daa7798cfe90c4")
    assert b64u(jwe.concat_kdf(shared, "A128GCM", 16, b"Alice", b"Bob")) == "VqqN6vgjbSBcIijNcacQGg"


@KINDS
def test_one_recipient_gives_the_flattened_form_that_go_jose_writes(pairs: dict[str, Pair], kind: str) -> None:
    packet = jwe.wrap(SecretBytes(PAYLOAD), [pairs[kind].spki])
    value = json.loads(packet)
    assert list(value) == ["protected", "encrypted_key", "iv", "ciphertext", "tag"]
    header = header_of(value)
    if kind.startswith("rsa"):
        assert list(header.items()) == [("alg", "RSA-OAEP"), ("enc", "A256GCM")]
    else:
        assert list(header) == ["alg", "enc", "epk"]
        assert list(header["epk"]) == ["kty", "crv", "x", "y"]
        assert (header["alg"], header["enc"], header["epk"]["crv"]) == ("ECDH-ES+A256KW", "A256GCM", kind.upper())
    assert jwe.unwrap(packet, [load(pairs[kind])]).expose() == PAYLOAD


def test_several_recipients_give_the_general_form_and_each_can_read_it(pairs: dict[str, Pair]) -> None:
    kinds = ["rsa-2048", "p-384", "p-256", "p-521"]
    packet = jwe.wrap(SecretBytes(PAYLOAD), [pairs[kind].spki for kind in kinds])
    value = json.loads(packet)
    assert list(value) == ["protected", "recipients", "encrypted_key", "iv", "ciphertext", "tag"]
    assert header_of(value) == {"enc": "A256GCM"}
    assert [entry["header"]["alg"] for entry in value["recipients"]] == ["RSA-OAEP"] + 3 * ["ECDH-ES+A256KW"]
    for kind in kinds:
        assert jwe.unwrap(packet, [load(pairs["stranger"]), load(pairs[kind])]).expose() == PAYLOAD


@pytest.mark.parametrize("alg", jwe.RSA_ALGORITHMS + jwe.EC_ALGORITHMS)
@pytest.mark.parametrize("enc", jwe.CONTENT_ALGORITHMS)
def test_what_another_library_writes_is_read(pairs: dict[str, Pair], alg: str, enc: str) -> None:
    pair = pairs["rsa-2048" if alg.startswith("RSA") else "p-256"]
    other = JWE(PAYLOAD, json.dumps({"alg": alg, "enc": enc}), algs=[alg, enc])
    other.add_recipient(JWK.from_pem(pair.spki))
    assert jwe.unwrap(other.serialize().encode(), [load(pair)]).expose() == PAYLOAD


def test_the_key_that_does_not_fit_is_named_and_nothing_else(pairs: dict[str, Pair]) -> None:
    packet = jwe.wrap(SecretBytes(PAYLOAD), [pairs["p-256"].spki, pairs["rsa-2048"].spki])
    strangers = [load(pairs[name]) for name in ("stranger", "rsa-stranger", "p-521")]
    with pytest.raises(KeyDenied, match="none of 3 private keys") as caught:
        jwe.unwrap(packet, strangers)
    assert caught.value.reason == "no-key"
    assert all(key.kid in str(caught.value) for key in strangers)
    assert "canary" not in f"{caught.value!r}{caught.value.__cause__!r}"
    with pytest.raises(KeyDenied, match="no private key is configured"):
        jwe.unwrap(packet, [])


def test_private_keys_do_not_print(pairs: dict[str, Pair]) -> None:
    key = load(pairs["p-256"])
    secret = JWK.from_pyca(pairs["p-256"].key).export(as_dict=True)["d"]
    assert secret not in f"{key!r}{key}"
    assert key.kid in repr(key)


def mutate(change: Callable[[dict[str, Any]], object], packet: bytes) -> bytes:
    value = json.loads(packet)
    change(value)
    return json.dumps(value).encode()


def protect(**changes: object) -> Callable[[dict[str, Any]], None]:
    """Rewrite the protected header (None removes a parameter)."""

    def change(value: dict[str, Any]) -> None:
        header = {name: entry for name, entry in (header_of(value) | changes).items() if entry is not None}
        value["protected"] = b64u(json.dumps(header).encode())

    return change


REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "alg none": protect(alg="none"),
    "alg dir": protect(alg="dir"),
    "alg RSA1_5": protect(alg="RSA1_5"),
    "alg A256KW": protect(alg="A256KW"),
    "alg PBES2": protect(alg="PBES2-HS256+A128KW", p2c=1, p2s="AA"),
    "alg direct ECDH-ES": protect(alg="ECDH-ES"),
    "alg missing": protect(alg=None),
    "alg not a string": protect(alg=["RSA-OAEP"]),
    "alg an object": protect(alg={"RSA-OAEP": 1}),
    "enc missing": protect(enc=None),
    "enc unknown": protect(enc="A256GCMX"),
    "enc null": protect(enc="null"),
    "zip": protect(zip="DEF"),
    "crit of an extension": protect(crit=["exp"], exp=1),
    "crit of a known name": protect(crit=["alg"]),
    "empty crit": protect(crit=[]),
    "jku": protect(jku="http://localhost/"),
    "p2c": protect(p2c=1 << 30),
    "jwk": protect(jwk={}),
    "unprotected": lambda value: value.update(unprotected={"alg": "RSA-OAEP"}),
    "aad": lambda value: value.update(aad="AA"),
    "unknown member": lambda value: value.update(more=1),
    "alg twice": lambda value: value.update(header={"alg": "RSA-OAEP"}),
    "zip in the other header": lambda value: value.update(header={"zip": "DEF"}),
    "header a list": lambda value: value.update(header=[]),
    "header null": lambda value: value.update(header=None),
    "no recipients": lambda value: value.update(recipients=[]),
    "recipients an object": lambda value: value.update(recipients={}),
    "recipient a string": lambda value: value.update(recipients=["x"]),
    "recipient without a key": lambda value: value.update(recipients=[{"header": {}}]),
    "protected missing": lambda value: value.pop("protected"),
    "protected not JSON": lambda value: value.update(protected=b64u(b"{")),
    "protected a list": lambda value: value.update(protected=b64u(b"[]")),
    "protected deep": lambda value: value.update(protected=b64u(b"[" * 5000)),
    "protected with duplicates": lambda value: value.update(
        protected=b64u(b'{"alg":"RSA-OAEP","enc":"A256GCM","alg":"dir"}')
    ),
    "protected empty": lambda value: value.update(protected=""),
    **{
        f"{name} missing": lambda value, name=name: value.pop(name)
        for name in ("iv", "ciphertext", "tag", "encrypted_key")
    },
    **{f"{name} a number": lambda value, name=name: value.update({name: 1}) for name in ("iv", "tag", "encrypted_key")},
    **{f"{name} padded": lambda value, name=name: value.update({name: value[name] + "="}) for name in ("iv", "tag")},
    **{f"{name} not base64url": lambda value, name=name: value.update({name: "a+b/"}) for name in ("iv", "ciphertext")},
    **{f"{name} not ASCII": lambda value, name=name: value.update({name: "ÄÄÄÄ"}) for name in ("iv", "protected")},
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["rsa-2048", "p-256"])
def test_packets_outside_the_allow_lists_are_refused(pairs: dict[str, Pair], name: str, kind: str) -> None:
    packet = mutate(REFUSED[name], jwe.wrap(SecretBytes(PAYLOAD), [pairs[kind].spki]))
    with pytest.raises(MalformedImage, match="JWE packet"):
        jwe.unwrap(packet, [load(pairs[kind])])


def test_every_changed_byte_of_a_packet_is_found(pairs: dict[str, Pair]) -> None:
    packet = jwe.wrap(SecretBytes(PAYLOAD), [pairs["p-256"].spki])
    key = load(pairs["p-256"])
    for at in range(0, len(packet), 3):
        changed = bytearray(packet)
        changed[at] ^= 1
        with pytest.raises((MalformedImage, KeyDenied)):
            jwe.unwrap(bytes(changed), [key])


@pytest.mark.parametrize(
    "epk",
    [
        None,
        [],
        "x",
        {},
        {"kty": "oct", "k": "AAAA"},
        {"kty": "EC", "crv": "P-256", "x": b64u(bytes(32)), "y": b64u(bytes(31) + b"\1")},
        {"kty": "EC", "crv": "P-521", "x": b64u(bytes(66)), "y": b64u(bytes(66))},
        {"kty": "OKP", "crv": "X25519", "x": b64u(bytes(32))},
        {"kty": "EC", "crv": "P-256", "x": 1, "y": 2},
    ],
    ids=str,
)
def test_an_ephemeral_key_that_is_no_point_of_the_curve_opens_nothing(pairs: dict[str, Pair], epk: object) -> None:
    packet = mutate(protect(epk=epk), jwe.wrap(SecretBytes(PAYLOAD), [pairs["p-256"].spki]))
    with pytest.raises(KeyDenied):
        jwe.unwrap(packet, [load(pairs["p-256"])])


def test_recipients_and_size_are_bounded(pairs: dict[str, Pair]) -> None:
    packet = jwe.wrap(SecretBytes(PAYLOAD), [pairs["p-256"].spki] * 3)
    assert jwe.unwrap(packet, [load(pairs["p-256"])], max_recipients=3).expose() == PAYLOAD
    with pytest.raises(LimitExceeded, match="recipients"):
        jwe.unwrap(packet, [load(pairs["p-256"])], max_recipients=2)
    with pytest.raises(LimitExceeded):
        jwe.unwrap(b" " * (1 << 20) + packet, [load(pairs["p-256"])])


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"a.b.c.d.e", b"\xff", b"[" * 100_000, b'{"a":1,"a":1}', b"NaN"])
def test_garbage_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedImage):
        jwe.unwrap(raw, [])


def private_pem(key: Any, form: PrivateFormat) -> bytes:
    pem: bytes = key.private_bytes(Encoding.PEM, form, NoEncryption())
    return pem


@KINDS
def test_private_keys_are_read_in_every_usual_form(pairs: dict[str, Pair], kind: str) -> None:
    """TraditionalOpenSSL is PKCS#1 for RSA and SEC1 for EC."""
    forms = (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL)
    kids = {jwe.PrivateKey.load(private_pem(pairs[kind].key, form)).kid for form in forms}
    assert len(kids) == 1


def test_private_keys_that_are_not_supported_are_refused_by_name(pairs: dict[str, Pair]) -> None:
    encrypted = pairs["p-256"].key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pw"))
    small = rsa.generate_private_key(65537, 1024)
    for pem, text in (
        (encrypted, "is encrypted"),
        (pairs["p-256"].spki, "not PEM of"),
        (b"", "not PEM of"),
        (b"-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n", "not PEM of"),
        (private_pem(small, PrivateFormat.PKCS8), "2048 bits"),
        (private_pem(ec.generate_private_key(ec.SECP256K1()), PrivateFormat.PKCS8), "P-521"),
        (private_pem(ed25519.Ed25519PrivateKey.generate(), PrivateFormat.PKCS8), "P-521"),
        (b"x" * (1 << 17), "one key"),
    ):
        with pytest.raises(InvalidArgument, match=text) as caught:
            jwe.PrivateKey.load(pem)
        assert "canary" not in str(caught.value)


def test_recipients_that_are_not_supported_are_refused_by_position(pairs: dict[str, Pair]) -> None:
    good = pairs["p-256"].spki
    ed = ed25519.Ed25519PrivateKey.generate().public_key()
    k1 = ec.generate_private_key(ec.SECP256K1()).public_key()
    small = rsa.generate_private_key(65537, 1024).public_key()
    for bad in (
        b"",
        pairs["p-256"].private.read_bytes(),
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        *(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in (ed, k1, small)),
    ):
        with pytest.raises(InvalidArgument, match="recipient 2"):
            jwe.wrap(SecretBytes(PAYLOAD), [good, bad])
    with pytest.raises(InvalidArgument, match="no recipient"):
        jwe.wrap(SecretBytes(PAYLOAD), [])


def test_no_error_shows_a_path_or_key(tmp_path: Path, pairs: dict[str, Pair]) -> None:
    packet = jwe.wrap(SecretBytes(PAYLOAD), [pairs["p-256"].spki])
    for change in REFUSED.values():
        with pytest.raises(SnapshotterError) as caught:
            jwe.unwrap(mutate(change, packet), [load(pairs["p-256"])])
        text = f"{caught.value!r}{caught.value.__cause__!r}"
        assert json.loads(packet)["ciphertext"] not in text
        assert str(tmp_path) not in text
