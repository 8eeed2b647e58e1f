"""Whatever the bytes are, the readers of key material and chunks raise SnapshotterError or nothing."""

import asyncio
import base64
import contextlib
import json
import os
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import chunk, encoding
from snapshotter.crypto.layer import LayerPrivate, LayerPublic
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import IntegrityError, SnapshotterError
from snapshotter.keys import annotations as enc
from snapshotter.keys import jwe, ocicrypt

_KEY = ec.generate_private_key(ec.SECP256R1())
KEY = jwe.PrivateKey.load(_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
SPKI = _KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
PACKET = json.loads(jwe.wrap(SecretBytes(b"{}"), [SPKI]))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
member_names = st.sampled_from(
    ["protected", "header", "recipients", "encrypted_key", "iv", "ciphertext", "tag", "aad", "unprotected", "zip"]
)
header_names = st.sampled_from(["alg", "enc", "epk", "kid", "apu", "apv", "typ", "cty", "crit", "zip", "p2c", "jwk"])


def b64u(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 5000)
@example(b'{"a":' * 5000)
def test_options_and_packets_of_any_bytes(raw: bytes) -> None:
    for parse in (
        LayerPublic.parse,
        lambda value: LayerPrivate.parse(SecretBytes(value)),
        lambda value: jwe.unwrap(value, [KEY]),
    ):
        with contextlib.suppress(SnapshotterError):
            parse(raw)
    for load in (jwe.PrivateKey.load, lambda value: jwe.wrap(SecretBytes(b"x"), [value])):
        with contextlib.suppress(SnapshotterError):
            load(raw)


@given(st.dictionaries(member_names, json_values, max_size=3))
@settings(deadline=None)
def test_a_packet_with_any_members_replaced(changes: dict[str, Any]) -> None:
    with contextlib.suppress(SnapshotterError):
        jwe.unwrap(json.dumps(PACKET | changes).encode(), [KEY])


@given(st.dictionaries(header_names, json_values, max_size=3), st.booleans())
@settings(deadline=None)
def test_a_packet_with_any_header_parameters(changes: dict[str, Any], is_protected: bool) -> None:
    if is_protected:
        header = json.loads(base64.urlsafe_b64decode(PACKET["protected"] + "=="))
        packet = PACKET | {"protected": b64u(json.dumps(header | changes).encode())}
    else:
        packet = PACKET | {"header": changes}
    with contextlib.suppress(SnapshotterError):
        jwe.unwrap(json.dumps(packet).encode(), [KEY])


@given(
    st.dictionaries(
        st.sampled_from([labels.ENC_PUBOPTS, labels.ENC_KEYS_JWE, labels.ENC_KEYS_PREFIX + "pkcs7"]),
        st.text(max_size=60)
        | st.binary(max_size=60).map(lambda raw: base64.b64encode(raw).decode())
        | st.just(base64.b64encode(json.dumps(PACKET).encode()).decode()),
    )
)
@settings(deadline=None)
@example({labels.ENC_PUBOPTS: "\ud800"})
def test_annotations_of_any_text(annotations: dict[str, str]) -> None:
    class Provider:
        async def unwrap(self, annotations: dict[str, str], limits: Limits) -> LayerPrivate:
            for packet in enc.packets(annotations, labels.ENC_KEYS_JWE, limits):
                return LayerPrivate.parse(jwe.unwrap(packet, [KEY]))
            return LayerPrivate(SecretBytes(bytes(32)), bytes(16), "")

    with contextlib.suppress(SnapshotterError):
        asyncio.run(ocicrypt.decrypt_layer(b"cipher", annotations, Provider(), Limits()))  # type: ignore[arg-type]


@given(
    st.binary(max_size=200) | st.binary(max_size=200).map(lambda raw: zstandard.compress(raw)),
    st.integers(-5, 300),
    st.integers(0, 5),
    st.none() | st.just(bytes(32)),
    st.integers(0, 3),
    st.binary(min_size=32, max_size=32),
)
def test_a_chunk_of_any_bytes_never_decodes_to_something_else(
    stored: bytes, size: int, codec: int, secret: bytes | None, digester: int, digest: bytes
) -> None:
    with contextlib.suppress(IntegrityError):
        plain = chunk.decode(stored, digest=digest, size=size, codec=codec, sealed_secret=secret, digester=digester)
        raise AssertionError(f"decoded to {plain!r}")


@given(st.binary(min_size=1, max_size=5000), st.sampled_from([0, 1, 3]), st.integers(1, 19))
@settings(deadline=None)
def test_any_content_seals_and_opens(plain: bytes, codec: int, level: int) -> None:
    digest = blake3(plain).digest()
    secret = chunk.derive(os.urandom(32), digest)
    packed, used = chunk.compress(plain, codec, level)
    stored = chunk.seal(secret, packed, len(plain), used)
    assert chunk.open_(secret, stored, len(plain), used) == packed
    assert chunk.decode(stored, digest=digest, size=len(plain), codec=used, sealed_secret=secret) == plain


@given(st.binary(max_size=100))
def test_base64_round_trips_and_has_one_spelling(raw: bytes) -> None:
    assert encoding.b64_decode(encoding.b64_encode(raw), "x") == raw
    assert encoding.b64url_decode(encoding.b64url_encode(raw), "x") == raw
    with contextlib.suppress(SnapshotterError):
        assert encoding.b64_encode(encoding.b64_decode(raw.decode("latin-1"), "x")).encode() == raw
