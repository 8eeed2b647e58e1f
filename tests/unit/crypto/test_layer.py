"""Whole-layer encryption: exactly ocicrypt's bytes, and nothing decrypted that was not authenticated."""

import json
import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher

from snapshotter.crypto import layer
from snapshotter.crypto.layer import LayerPrivate, LayerPublic
from snapshotter.crypto.secret import SecretBytes
from snapshotter.digest import Digest
from snapshotter.errors import DecryptError, LimitExceeded, MalformedImage, SnapshotterError

KEY = b"01234567890123456789012345678912"
NONCE = bytes(range(16))
PLAIN = b"this is some data" * 40


def private(plain: bytes = PLAIN) -> LayerPrivate:
    return LayerPrivate(SecretBytes(KEY), NONCE, Digest.of(plain))


def test_known_bytes() -> None:
    cipher, public = layer.encrypt_with(PLAIN, private())
    assert cipher[:16].hex() == "689165ecbfa0cc73f4761fbcf1591378"
    assert public.pack() == (
        b'{"cipher":"AES_256_CTR_HMAC_SHA256","hmac":"4CN9suydK4dDw+nnvMEY7nSiPXPseNPWPB7gLXzUE2U=","cipheroptions":{}}'
    )
    assert private().pack().expose() == (
        b'{"symkey":"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MTI=","digest":"%b",'
        b'"cipheroptions":{"nonce":"AAECAwQFBgcICQoLDA0ODw=="}}' % Digest.of(PLAIN).encode()
    )
    assert layer.decrypt_verified(cipher, private(), public) == PLAIN


def test_aes_256_ctr_of_nist_sp_800_38a() -> None:
    """F.5.5, CTR-AES256.Encrypt, all four blocks."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher, _ = layer.encrypt_with(plain, LayerPrivate(SecretBytes(key), counter, ""))
    assert cipher.hex() == (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100_003])
def test_what_was_encrypted_comes_back(size: int) -> None:
    plain = os.urandom(size)
    cipher, public, options = layer.encrypt(plain)
    assert len(cipher) == size
    assert layer.decrypt_verified(memoryview(cipher), options, public) == plain
    assert LayerPublic.parse(public.pack()) == public
    assert LayerPrivate.parse(options.pack()) == options


def test_the_counter_wraps_over_all_128_bits() -> None:
    options = LayerPrivate(SecretBytes(KEY), b"\xff" * 16, "")
    cipher, public = layer.encrypt_with(PLAIN, options)
    assert layer.decrypt_verified(cipher, options, public) == PLAIN
    following, _ = layer.encrypt_with(PLAIN[16:], LayerPrivate(SecretBytes(KEY), bytes(16), ""))
    assert cipher[16:] == following


def test_every_layer_gets_its_own_key() -> None:
    (one, _, first), (other, _, second) = layer.encrypt(PLAIN), layer.encrypt(PLAIN)
    assert one != other
    assert first.symkey != second.symkey
    assert first.nonce != second.nonce


def test_nothing_is_decrypted_when_the_mac_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    cipher, public = layer.encrypt_with(PLAIN, private())

    def never(_: Cipher[Any]) -> None:
        raise AssertionError("decrypted before it was authenticated")

    monkeypatch.setattr(Cipher, "decryptor", never)
    changed = [
        (bytes([cipher[0] ^ 1]) + cipher[1:], public),
        (cipher[:-1] + bytes([cipher[-1] ^ 1]), public),
        (cipher[:-1], public),
        (cipher + b"\0", public),
        (b"", public),
        *(
            (cipher, LayerPublic(public.hmac[:at] + bytes([public.hmac[at] ^ 1]) + public.hmac[at + 1 :]))
            for at in range(32)
        ),
        (cipher, LayerPublic(public.hmac[:31])),
    ]
    for broken, options in changed:
        with pytest.raises(DecryptError) as caught:
            layer.decrypt_verified(broken, private(), options)
        assert caught.value.reason == "layer-hmac"


def test_options_do_not_print_keys() -> None:
    assert "0123456789" not in repr(private())
    assert "AAECAw" not in repr(private())


HMAC = "4CN9suydK4dDw+nnvMEY7nSiPXPseNPWPB7gLXzUE2U="
PUBLIC: dict[str, Any] = {"cipher": layer.CIPHER, "hmac": HMAC, "cipheroptions": {}}
PRIVATE: dict[str, Any] = {
    "symkey": "Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTAxMjM=",
    "digest": Digest.of(PLAIN),
    "cipheroptions": {"nonce": "AAECAwQFBgcICQoLDA0ODw=="},
}
NOT_STRINGS = (None, 1, True, [], {}, [1] * 32)
BAD_BASE64 = (
    "",
    "=",
    "AA",
    "A===",
    HMAC[:-1],
    HMAC + "\n",
    " " + HMAC,
    HMAC.replace("+", "-"),
    HMAC[:-2] + "V=",
    HMAC * 2,
    "ä",
)


@pytest.mark.parametrize(
    "value",
    [
        *({**PUBLIC, "hmac": bad} for bad in (*NOT_STRINGS, *BAD_BASE64)),
        *({**PUBLIC, "cipher": bad} for bad in (*NOT_STRINGS, "", "AES_256_CTR", "aes_256_ctr_hmac_sha256")),
        *({**PUBLIC, "cipheroptions": bad} for bad in (None, [], "", 0, False, {"nonce": "AAECAwQFBgcICQoLDA0ODw=="})),
        *({name: PUBLIC[name] for name in PUBLIC if name != missing} for missing in PUBLIC),
        {**PUBLIC, "more": 1},
    ],
)
def test_public_options_that_ocicrypt_does_not_write_are_refused(value: object) -> None:
    with pytest.raises(MalformedImage, match="public layer options"):
        LayerPublic.parse(json.dumps(value).encode())


@pytest.mark.parametrize(
    "value",
    [
        *({**PRIVATE, "symkey": bad} for bad in (*NOT_STRINGS, *BAD_BASE64)),
        *({**PRIVATE, "digest": bad} for bad in (*NOT_STRINGS, "sha256", 'sha256:"', "sha256:" + "a" * 300)),
        *(
            {**PRIVATE, "cipheroptions": bad}
            for bad in (None, [], "", {}, {"nonce": None}, {"nonce": HMAC}, {"nonce": ""})
        ),
        {**PRIVATE, "cipheroptions": {**PRIVATE["cipheroptions"], "more": ""}},
        {name: PRIVATE[name] for name in PRIVATE if name != "symkey"},
        {name: PRIVATE[name] for name in PRIVATE if name != "cipheroptions"},
        {**PRIVATE, "more": 1},
    ],
)
def test_private_options_that_ocicrypt_does_not_write_are_refused_without_showing_them(value: object) -> None:
    with pytest.raises(MalformedImage, match="private layer options") as caught:
        LayerPrivate.parse(SecretBytes(json.dumps(value).encode()))
    text = f"{caught.value!r}{caught.value.__cause__!r}"
    assert PRIVATE["symkey"][:12] not in text
    assert "canary" not in text


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"cipher":NaN}',
        b'{"cipher":1e999}',
        b"[" * 4000,
        b'{"a":' * 800 + b"1" + b"}" * 800,
        json.dumps(PUBLIC)[:-1].encode() + b',"hmac":"' + HMAC.encode() + b'"}',
        json.dumps(PUBLIC).encode() + b"x",
        b"\xef\xbb\xbf" + json.dumps(PUBLIC).encode(),
    ],
)
def test_what_is_not_one_plain_json_object_is_refused(raw: bytes) -> None:
    for parse in (LayerPublic.parse, lambda value: LayerPrivate.parse(SecretBytes(value))):
        with pytest.raises(SnapshotterError):
            parse(raw)


def test_options_are_bounded() -> None:
    with pytest.raises(LimitExceeded):
        LayerPublic.parse(b" " * 5000 + json.dumps(PUBLIC).encode())
