"""Whatever a key service or its client says, readers of it raise SnapshotterError or nothing."""

import base64
import contextlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snapshotter.build.options import load_recipient
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, SnapshotterError
from snapshotter.kbs_dev import appraisal
from snapshotter.kbs_dev import jwe as server_jwe
from snapshotter.keys import packet, rcar, teekey, ttrpc
from snapshotter.keys.packet import Kek, Packet
from snapshotter.keys.rcar import Challenge, Token
from snapshotter.keys.resource import ResourceUri
from snapshotter.keys.teekey import TeeKey

KINDS: tuple[teekey.Kind, ...] = ("P-256", "P-521", "RSA")
KEYS = {kind: TeeKey.generate(kind) for kind in KINDS}
KEK = Kek(ResourceUri("a", "b", "c"), SecretBytes(bytes(32)))
SIGNER = appraisal.TokenSigner(300)
NOW = 1_700_000_000.0
TOKEN = SIGNER.issue({"report_data": ""}, {}, {"tee-pubkey": KEYS["P-256"].jwk}, NOW)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
anything = st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode())


def b64u(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@given(anything)
@example(b"[" * 5000)
@example(b'{"a":' * 5000)
@example(b'{"nonce":' + b"9" * 5000 + b"}")
def test_messages_of_any_bytes(raw: bytes) -> None:
    for parse in (
        Packet.parse,
        packet.check_authenticated,
        Challenge.parse,
        lambda value: Token.parse(value, KEYS["RSA"].jwk, None, NOW),
        rcar.error_variant,
        ttrpc.decode_response,
        *(key.open for key in KEYS.values()),
    ):
        with contextlib.suppress(SnapshotterError):
            parse(raw)


def mutated(value: dict[str, Any], changes: dict[str, Any]) -> bytes:
    return json.dumps(value | changes).encode()


@given(st.dictionaries(st.sampled_from(["kid", "wrapped_data", "iv", "wrap_type", "version", "provider"]), json_values))
def test_packets_with_any_members_replaced_open_to_nothing_else(changes: dict[str, Any]) -> None:
    options = b"private options"
    value = json.loads(KEK.wrap(SecretBytes(options)))
    with contextlib.suppress(SnapshotterError):
        found = Packet.parse(mutated(value, changes))
        if found.wrap_type == "A256GCM":
            assert found.open(KEK.key).expose() == options


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(["alg", "enc", "epk", "crit", "kid"]), json_values))
@settings(max_examples=200)
def test_resource_headers_with_any_members(kind: teekey.Kind, changes: dict[str, Any]) -> None:
    value = json.loads(server_jwe.encrypt(KEYS[kind].jwk, b"resource"))
    header = json.loads(base64.urlsafe_b64decode(value["protected"] + "==")) | changes
    with contextlib.suppress(SnapshotterError):
        KEYS[kind].open(mutated(value, {"protected": b64u(header)}))


@given(st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "n", "e", "alg", "d"]), json_values))
def test_public_keys_of_any_members(changes: dict[str, Any]) -> None:
    for key in KEYS.values():
        with contextlib.suppress(SnapshotterError):
            server_jwe.encrypt(key.jwk | changes, b"resource")


@given(st.dictionaries(st.sampled_from(["alg", "jwk", "crit", "kid", "x5c"]), json_values, min_size=1))
def test_tokens_with_any_header_are_never_taken(changes: dict[str, Any]) -> None:
    head, body, tail = TOKEN.split(".")
    header = json.loads(base64.urlsafe_b64decode(head + "==")) | changes
    answer = json.dumps({"token": f"{b64u(header)}.{body}.{tail}"}).encode()
    with pytest.raises(SnapshotterError):
        Token.parse(answer, KEYS["P-256"].jwk, SIGNER.public_key, NOW)


@given(
    st.dictionaries(st.sampled_from(["exp", "nbf", "iat", "submods", "tee-pubkey", "customized_claims"]), json_values)
)
def test_signed_claims_of_any_kind(changes: dict[str, Any]) -> None:
    claims = json.loads(base64.urlsafe_b64decode(TOKEN.split(".")[1] + "==")) | changes
    answer = json.dumps({"token": SIGNER.sign(claims)}).encode()
    with contextlib.suppress(SnapshotterError):
        Token.parse(answer, KEYS["P-256"].jwk, SIGNER.public_key, NOW)


@given(st.data())
def test_tokens_cut_or_changed_anywhere_are_never_taken(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(TOKEN) - 1))
    letter = data.draw(st.sampled_from("ABz09-_. é"))
    for text in (TOKEN[:at], TOKEN[:at] + letter + TOKEN[at + 1 :]):
        if text != TOKEN:
            with pytest.raises(SnapshotterError):
                Token.parse(json.dumps({"token": text}).encode(), KEYS["P-256"].jwk, None, NOW)


@given(json_values, json_values)
def test_evidence_and_initdata_of_any_kind(evidence: Any, init_data: Any) -> None:
    with contextlib.suppress(SnapshotterError):
        appraisal.appraise(evidence, bytes(48))
    with contextlib.suppress(SnapshotterError):
        appraisal.init_data_claims(init_data)


@given(st.text(max_size=300))
@example("= =")
@example('algorithm = "sha256"\n[data]\n"a.toml" = "= ="')
@example('algorithm = "sha256"\na = ' + "[" * 5000)
def test_initdata_of_any_text(body: str) -> None:
    with contextlib.suppress(SnapshotterError):
        appraisal.init_data_claims({"format": "toml", "body": body})


@given(st.text(max_size=80) | st.from_regex(r"kbs(\+\w+)?://[\w.:]*(/[\w.%-]*){0,5}(\?\w*)?"))
def test_resource_names_are_paths_that_stay_inside(text: str) -> None:
    with contextlib.suppress(SnapshotterError):
        uri = ResourceUri.parse(text)
        assert ResourceUri.parse(str(uri)) == uri
        parts = uri.path.split("/")
        assert len(parts) == 3
        assert not any(part.startswith(".") or not part for part in parts)


@given(st.text(max_size=60) | st.text(max_size=30).map(lambda text: f"kbs:///a/b/c={text}"))
def test_recipients_of_any_text(text: str) -> None:
    with contextlib.suppress(InvalidArgument):
        load_recipient(text)


@given(st.binary(max_size=500), st.binary(max_size=64))
def test_ttrpc_fields_round_trip(first: bytes, second: bytes) -> None:
    message = ttrpc.bytes_field(1, first) + ttrpc.bytes_field(3, second)
    assert ttrpc.last_bytes(ttrpc.parse(message), 1) == first
    assert ttrpc.last_bytes(ttrpc.parse(message), 3) == second
    frame = ttrpc.encode_request("s", "m", first)
    length, stream, kind, flags = ttrpc.HEADER.unpack(frame[:10])
    assert (length, stream, kind, flags) == (len(frame) - 10, 1, 1, 0)


@given(st.binary(min_size=1, max_size=4000), st.sampled_from(KINDS))
@settings(max_examples=30)
def test_any_resource_reaches_any_key(content: bytes, kind: teekey.Kind) -> None:
    assert KEYS[kind].open(server_jwe.encrypt(KEYS[kind].jwk, content)).expose() == content


@given(st.binary(min_size=1, max_size=200))
def test_any_options_wrap_and_open_as_plain_aes_gcm(options: bytes) -> None:
    value = json.loads(KEK.wrap(SecretBytes(options)))
    iv, wrapped = base64.b64decode(value["iv"]), base64.b64decode(value["wrapped_data"])
    assert AESGCM(bytes(32)).decrypt(iv, wrapped, None) == options
