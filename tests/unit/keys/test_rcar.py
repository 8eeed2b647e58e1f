"""Messages and keys of the KBS protocol, held against published vectors and another JOSE implementation."""

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwcrypto.jwe import JWE
from jwcrypto.jwk import JWK
from jwcrypto.jws import JWS

from snapshotter.errors import KeyDenied, LimitExceeded, MalformedImage, SnapshotterError
from snapshotter.kbs_dev import jwe as server_jwe
from snapshotter.kbs_dev.appraisal import TokenSigner
from snapshotter.keys import eckey, rcar, teekey
from snapshotter.keys.rcar import Challenge, Token
from snapshotter.keys.teekey import TeeKey

KINDS: tuple[teekey.Kind, ...] = ("P-256", "P-521", "RSA")
NONCE = base64.b64encode(bytes(range(32))).decode()
NOW = 1_700_000_000.0
SECRET = b"resource content"


def b64u(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def keys() -> dict[str, TeeKey]:
    return {kind: TeeKey.generate(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def signer() -> TokenSigner:
    return TokenSigner(300)


def token(signer: TokenSigner, key: TeeKey, **changes: Any) -> str:
    found = signer.issue({"report_data": ""}, {}, {"nonce": NONCE, "tee-pubkey": key.jwk}, NOW)
    if not changes:
        return found
    claims = json.loads(base64.urlsafe_b64decode(found.split(".")[1] + "==")) | changes
    return signer.sign({name: value for name, value in claims.items() if value is not None})


def answer(text: str) -> bytes:
    return json.dumps({"token": text}).encode()


# canonical form and report data


def test_canonical_form_and_hash_of_a_published_vector() -> None:
    assert hashlib.sha384(rcar.canonical({"b": 1, "a": "test", "c": {"d": "e"}})).hexdigest() == (
        "e71ce8e70d814ba6639c3612ebee0ff1f76f650f8dbb5e47157e0f3f525cd22c4597480a186427c813ca941da78870c3"
    )


def test_report_data_of_a_vector() -> None:
    jwk = {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": "AA", "y": "AQ"}
    assert Challenge("bm9uY2U=").report_data(jwk, "").hex() == (
        "6a0dbcf35ea30df888c56e27e591700ae1ddbb032acae087f8709aafce815d50e4ce81d4a2263f70c33e5734dfb89f0f"
    )


def test_report_data_binds_nonce_key_and_devices(keys: dict[str, TeeKey]) -> None:
    challenge, jwk = Challenge(NONCE), keys["P-256"].jwk
    bound = {
        challenge.report_data(jwk, ""),
        challenge.report_data(jwk, "{}"),
        challenge.report_data(keys["P-521"].jwk, ""),
        challenge.device_report_data(jwk),
        Challenge(NONCE[::-1]).report_data(jwk, ""),
        Challenge(NONCE, "sha512").report_data(jwk, ""),
    }
    assert len(bound) == 6
    assert {len(value) for value in bound} == {48, 64}


# requests


def test_requests_are_what_a_kbs_reads(keys: dict[str, TeeKey]) -> None:
    assert json.loads(rcar.request("snp")) == {
        "version": "0.4.0",
        "tee": "snp",
        "extra-params": {"supported-hash-algorithms": ["sha256", "sha384", "sha512"]},
    }
    jwk = keys["P-256"].jwk
    assert json.loads(rcar.attestation(Challenge(NONCE), jwk, {"svn": "1"}, "{}", "algorithm = 'sha384'")) == {
        "init-data": {"format": "toml", "body": "algorithm = 'sha384'"},
        "runtime-data": {"nonce": NONCE, "tee-pubkey": jwk},
        "tee-evidence": {"primary_evidence": {"svn": "1"}, "additional_evidence": "{}"},
    }
    assert json.loads(rcar.attestation(Challenge(NONCE), jwk, {}, "", ""))["init-data"] is None


def test_challenges() -> None:
    def challenge(**members: Any) -> Challenge:
        return Challenge.parse(json.dumps({"nonce": NONCE} | members).encode())

    assert challenge() == challenge(**{"extra-params": ""}) == challenge(**{"extra-params": {}}) == Challenge(NONCE)
    for name in ("sha512", "SHA512"):
        assert challenge(**{"extra-params": {"selected-hash-algorithm": name}}).hash_algorithm == "sha512"
    wrong: list[dict[str, Any]] = [
        {"nonce": ""},
        {"nonce": 1},
        {"nonce": "AAAA"},
        {"nonce": base64.b64encode(bytes(65)).decode()},
        {"nonce": NONCE + "\n"},
        {"extra-params": "x"},
        {"extra-params": []},
        {"extra-params": [1]},
        {"extra-params": {"selected-hash-algorithm": "md5"}},
        {"extra-params": {"selected-hash-algorithm": None}},
        {"extra-params": {"selected-hash-algorithm": []}},
        {"more": 1},
    ]
    for members in wrong:
        if members == {"extra-params": []}:
            continue  # as empty as ""
        with pytest.raises(MalformedImage, match="challenge"):
            challenge(**members)


# tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_about_our_key(signer: TokenSigner, keys: dict[str, TeeKey], kind: str) -> None:
    for known in (None, signer.public_key):
        found = Token.parse(answer(token(signer, keys[kind])), keys[kind].jwk, known, NOW)
        assert found.expires == NOW + 300
    assert found.text not in repr(found)


def test_tokens_are_what_another_implementation_verifies(signer: TokenSigner, keys: dict[str, TeeKey]) -> None:
    jws = JWS()
    jws.deserialize(token(signer, keys["P-256"]), JWK.from_pyca(signer.public_key))
    assert json.loads(jws.payload)["exp"] == NOW + 300


def test_a_signing_key_as_attestation_services_write_it(keys: dict[str, TeeKey]) -> None:
    """With certificates, and without the leading zeros of its coordinates."""
    jwk = keys["P-256"].jwk
    while True:
        private = ec.generate_private_key(ec.SECP256R1())
        numbers = private.public_key().public_numbers()
        if numbers.x >> 248 == 0:
            break
    shown = {"kty": "EC", "crv": "P-256", "alg": "ES256", "x5c": ["AAAA"], "x5u": "https://as.example/chain.pem"}
    shown |= {n: b64u(v.to_bytes((v.bit_length() + 7) // 8, "big")) for n, v in (("x", numbers.x), ("y", numbers.y))}
    jws = JWS(json.dumps({"exp": NOW + 9, "tee-pubkey": jwk}))
    jws.add_signature(JWK.from_pyca(private), protected=json.dumps({"alg": "ES256", "typ": "JWT", "jwk": shown}))
    assert Token.parse(answer(jws.serialize(compact=True)), jwk, None, NOW).expires == NOW + 9


def test_a_token_where_other_services_name_the_key(signer: TokenSigner, keys: dict[str, TeeKey]) -> None:
    jwk = keys["P-256"].jwk
    for place in ({"customized_claims": {"runtime_data": {"tee-pubkey": jwk}}}, {"tee-pubkey": jwk}):
        text = token(signer, keys["P-256"], submods=None, **place)
        assert Token.parse(answer(text), jwk, None, NOW).text == text


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"exp": NOW}, "expired"),
        ({"exp": NOW - 10_000}, "expired"),
        ({"nbf": NOW + 1000}, "not in force"),
        ({"iat": NOW + 1000}, "not in force"),
        ({"exp": None}, "exp"),
        ({"exp": "soon"}, "exp"),
        ({"exp": True}, "exp"),
        ({"exp": 1e300}, "exp"),
        ({"nbf": []}, "time"),
        ({"submods": None}, "not about"),
        ({"submods": []}, "not about"),
        ({"submods": {"cpu0": 3}}, "not about"),
    ],
)
def test_tokens_that_are_not_in_force_or_anothers(
    signer: TokenSigner, keys: dict[str, TeeKey], changes: dict[str, Any], check: str
) -> None:
    with pytest.raises((KeyDenied, MalformedImage), match=check):
        Token.parse(answer(token(signer, keys["P-256"], **changes)), keys["P-256"].jwk, signer.public_key, NOW)


def test_a_token_about_another_key_is_refused(signer: TokenSigner, keys: dict[str, TeeKey]) -> None:
    for other in (TeeKey.generate("P-256"), keys["P-521"], keys["RSA"]):
        with pytest.raises(KeyDenied, match="not about this attestation's key"):
            Token.parse(answer(token(signer, other)), keys["P-256"].jwk, signer.public_key, NOW)


def test_a_forged_token_is_refused(signer: TokenSigner, keys: dict[str, TeeKey]) -> None:
    """By the configured signer even when it verifies under the key in its own header."""
    key, stranger = keys["P-256"], TokenSigner(300)
    forged = token(stranger, key)
    assert Token.parse(answer(forged), key.jwk, None, NOW)
    with pytest.raises(KeyDenied, match="signature"):
        Token.parse(answer(forged), key.jwk, signer.public_key, NOW)
    head, body, tail = token(signer, key).split(".")
    longer = token(signer, key, exp=NOW + 9999).split(".")[1]
    for text in (f"{head}.{longer}.{tail}", f"{forged.split('.')[0]}.{body}.{tail}"):
        with pytest.raises(KeyDenied, match="signature"):
            Token.parse(answer(text), key.jwk, None, NOW)


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "HS256"},
        {"alg": "ES384"},
        {"alg": "RS256"},
        {"alg": 1},
        {},
        {"alg": "ES256", "crit": ["exp"]},
        {"alg": "ES256", "crit": ["b64"], "b64": False},
        {"alg": "ES256", "jku": "https://attacker.example/keys"},
        {"alg": "ES256", "jwk": None},
        {"alg": "ES256", "jwk": {}},
        {"alg": "ES256", "jwk": {"kty": "oct", "k": "AAAA"}},
        {"alg": "ES256", "jwk": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}},
    ],
    ids=json.dumps,
)
def test_tokens_with_another_algorithm_or_unknown_headers(
    signer: TokenSigner, keys: dict[str, TeeKey], header: dict[str, Any]
) -> None:
    _, body, tail = token(signer, keys["P-256"]).split(".")
    for signature in (tail, b64u(bytes(64)), b64u(bytes(64))[:-2]):
        with pytest.raises((MalformedImage, KeyDenied)):
            Token.parse(answer(f"{b64u(header)}.{body}.{signature}"), keys["P-256"].jwk, None, NOW)
    with pytest.raises(MalformedImage, match="not a JWT"):
        Token.parse(answer(f"{b64u(header)}.{body}."), keys["P-256"].jwk, None, NOW)


def test_a_token_signed_on_another_curve(keys: dict[str, TeeKey]) -> None:
    key = ec.generate_private_key(ec.SECP521R1())
    jwk = {"kty": "EC", "crv": "P-521"} | eckey.coordinates(key.public_key())
    text = f"{b64u({'alg': 'ES256', 'jwk': jwk})}.{b64u({'exp': NOW + 1})}.{b64u(bytes(64))}"
    with pytest.raises(MalformedImage, match="P-256"):
        Token.parse(answer(text), keys["P-256"].jwk, None, NOW)


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b'{"token":1}', b'{"token":""}', b'{"token":"a.b"}', b"\xff", b"{" * 99]
)
def test_answers_that_hold_no_token(raw: bytes, keys: dict[str, TeeKey]) -> None:
    with pytest.raises(MalformedImage):
        Token.parse(raw, keys["P-256"].jwk, None, NOW)
    with pytest.raises(LimitExceeded):
        Token.parse(answer("a" * rcar.MESSAGE_BYTES), keys["P-256"].jwk, None, NOW)


# resources


@pytest.mark.parametrize("kind", KINDS)
def test_a_resource_reaches_the_attested_key_only(keys: dict[str, TeeKey], kind: teekey.Kind) -> None:
    raw = server_jwe.encrypt(keys[kind].jwk, SECRET)
    assert keys[kind].open(raw).expose() == SECRET
    others = [*(key for name, key in keys.items() if name != kind), TeeKey.generate(kind)]
    for other in others:
        with pytest.raises(MalformedImage):
            other.open(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_resources_of_and_for_another_implementation(keys: dict[str, TeeKey], kind: str) -> None:
    key = keys[kind]
    theirs = JWE(SECRET, json.dumps({"alg": key.jwk["alg"], "enc": "A256GCM"}))
    theirs.add_recipient(JWK(**{name: value for name, value in key.jwk.items() if name != "alg"}))
    names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    parts = theirs.serialize(compact=True).split(".")
    assert key.open(json.dumps(dict(zip(names, parts, strict=True))).encode()).expose() == SECRET
    ours = JWE(algs=[key.jwk["alg"], "A256GCM"])
    ours.deserialize(server_jwe.encrypt(key.jwk, SECRET).decode(), JWK.from_pyca(key.private))
    assert ours.payload == SECRET


def test_the_header_is_spelled_as_clients_rebuild_it(keys: dict[str, TeeKey]) -> None:
    for kind, members in (("P-521", ["alg", "enc", "epk"]), ("RSA", ["alg", "enc"])):
        protected = json.loads(server_jwe.encrypt(keys[kind].jwk, SECRET))["protected"]
        raw = base64.urlsafe_b64decode(protected + "==")
        value = json.loads(raw)
        assert list(value) == members
        assert list(value.get("epk", {"crv": 0, "kty": 0, "x": 0, "y": 0})) == ["crv", "kty", "x", "y"]
        assert raw == json.dumps(value, separators=(",", ":")).encode()


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_resource_is_authenticated(keys: dict[str, TeeKey], kind: str) -> None:
    value = json.loads(server_jwe.encrypt(keys[kind].jwk, SECRET))
    for name in value:
        raw = bytearray(base64.urlsafe_b64decode(value[name] + "=="))
        raw[-1] ^= 1
        with pytest.raises(MalformedImage):
            keys[kind].open(json.dumps(value | {name: b64u(bytes(raw))}).encode())
    respelled = json.dumps(json.loads(base64.urlsafe_b64decode(value["protected"] + "=="))).encode()
    with pytest.raises(MalformedImage, match="authenticate"):
        keys[kind].open(json.dumps(value | {"protected": b64u(respelled)}).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"alg": "none"},
        {"alg": "dir"},
        {"alg": "RSA1_5"},
        {"alg": "RSA-OAEP"},
        {"alg": "ECDH-ES"},
        {"alg": "ECDH-ES+A128KW"},
        {"alg": ["RSA-OAEP-256"]},
        {"enc": "A128GCM"},
        {"enc": "A256CBC-HS512"},
        {"crit": ["exp"]},
        {"crit": []},
        {"zip": "DEF"},
        {"kid": "x"},
        {"apu": "AA"},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_algorithms_and_headers_are_refused(keys: dict[str, TeeKey], kind: str, changes: dict[str, Any]) -> None:
    value = json.loads(server_jwe.encrypt(keys[kind].jwk, SECRET))
    header = json.loads(base64.urlsafe_b64decode(value["protected"] + "=="))
    with pytest.raises(MalformedImage):
        keys[kind].open(json.dumps(value | {"protected": b64u(header | changes)}).encode())


def test_ephemeral_keys_off_the_curve_or_on_another(keys: dict[str, TeeKey]) -> None:
    key = keys["P-256"]
    value = json.loads(server_jwe.encrypt(key.jwk, SECRET))
    header = json.loads(base64.urlsafe_b64decode(value["protected"] + "=="))
    good, other = header["epk"], ec.generate_private_key(ec.SECP521R1()).public_key()
    wrong = [
        None,
        [],
        {},
        good | {"y": good["x"]},
        good | {"x": good["x"][:-4]},
        good | {"x": b64u(bytes(32)), "y": b64u(bytes(32))},
        good | {"crv": "P-521"},
        good | {"crv": "P-384"},
        good | {"crv": "secp256k1"},
        good | {"kty": "OKP"},
        good | {"d": good["x"]},
        {"kty": "EC", "crv": "P-521"} | eckey.coordinates(other),
    ]
    for epk in wrong:
        with pytest.raises(MalformedImage, match="epk"):
            key.open(json.dumps(value | {"protected": b64u(header | {"epk": epk})}).encode())


def test_answers_of_another_form_or_too_long(keys: dict[str, TeeKey]) -> None:
    key = keys["P-256"]
    raw = server_jwe.encrypt(key.jwk, SECRET)
    value = json.loads(raw)
    wrong: list[Any] = [{}, [], value | {"aad": "AA"}, value | {"recipients": []}, value | {"iv": b64u(bytes(16))}]
    wrong += [{k: v for k, v in value.items() if k != name} for name in value]
    wrong += [value | {name: other} for name in value for other in (None, 1, "", "=", "é", value[name] + "=")]
    for item in wrong:
        with pytest.raises(MalformedImage):
            key.open(json.dumps(item).encode())
    for at in range(0, len(raw), 5):
        with pytest.raises(SnapshotterError):
            key.open(raw[:at])
    with pytest.raises(LimitExceeded):
        key.open(b" " * (teekey.ANSWER_BYTES + 1))


def test_the_server_refuses_keys_that_are_none(keys: dict[str, TeeKey]) -> None:
    small = rsa.generate_private_key(65537, 1024).public_key().public_numbers().n.to_bytes(128, "big")
    ec_jwk, rsa_jwk = keys["P-256"].jwk, keys["RSA"].jwk
    wrong: list[Any] = [
        None,
        "x",
        {},
        ec_jwk | {"alg": "ECDH-ES"},
        ec_jwk | {"crv": "P-521"},
        ec_jwk | {"d": "AA"},
        ec_jwk | {"y": ec_jwk["x"]},
        rsa_jwk | {"alg": "RSA1_5"},
        rsa_jwk | {"n": b64u(small)},
        rsa_jwk | {"e": "AA"},
        rsa_jwk | {"d": "AA"},
        {"kty": "AKP", "alg": "ML-KEM-768+A192KW", "pub": "AA"},
    ]
    for jwk in wrong:
        with pytest.raises(MalformedImage):
            server_jwe.check_key(jwk)


def test_error_kinds() -> None:
    def kind(value: Any) -> str:
        return rcar.error_variant(json.dumps(value).encode())

    base = "https://github.com/confidential-containers/kbs/errors/"
    assert kind({"type": base + "PolicyDeny", "detail": "canary"}) == "PolicyDeny"
    for other in (
        {},
        [],
        {"type": 1},
        {"type": base},
        {"type": base + "a b"},
        {"type": base + "x" * 99},
        {"type": "X"},
    ):
        assert kind(other) == ""
    assert rcar.error_variant(b" " * (rcar.MESSAGE_BYTES + 1)) == rcar.error_variant(b"\xff") == ""
