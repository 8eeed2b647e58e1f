"""Writes crypto.json: worked bytes of sealed chunks and of layer encryption for a second implementation.

Deterministic: the compressed forms are spelled out by hand, because compressor releases differ in their output. Uses
primitives only, not the package, so that the test that reads the file compares two implementations.

    python tests/vectors/make_crypto.py          writes tests/vectors/crypto.json
"""

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NONE, LZ4, ZSTD = 0, 1, 3
IMAGE_SECRET = bytes(range(32))
PUBLIC_SECRET = hashlib.sha256(b"sealed-rafs/1 public").digest()

A_4096 = b"A" * 4096
ABCD_32 = b"abcd" * 8
# magic, single segment with a 2-byte content size (4096 - 256), last block of type RLE: 4096 times "A"
ZSTD_A_4096 = bytes.fromhex("28b52ffd 60 000f 038000 41")
# 4 literals, then a match of 23 at distance 4, then the 5 last literals
LZ4_ABCD_32 = bytes.fromhex("4f 61626364 0400 04 50 6461626364")


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()


def chunk(name: str, secret: bytes, plain: bytes, codec: int, compressed: bytes) -> dict[str, Any]:
    """Every intermediate value of one sealed chunk, as hex."""
    digest = blake3(plain).digest()
    m = HKDF(hashes.SHA256(), 32, None, b"sealed-rafs/1 chunk" + digest).derive(secret)
    key = hmac_sha256(m, b"key")
    aad = b"sealed-rafs/1" + len(plain).to_bytes(4, "little") + bytes([codec])
    nonce = hmac_sha256(m, b"nonce" + aad + compressed)[:12]
    stored = nonce + AESGCM(key).encrypt(nonce, compressed, aad)
    identity = hmac_sha256(m, b"id" + bytes([codec]) + len(stored).to_bytes(4, "little"))
    raw = {
        "S": secret,
        "p": plain,
        "d": digest,
        "M": m,
        "c": compressed,
        "K": key,
        "AAD": aad,
        "N": nonce,
        "stored": stored,
        "id": identity,
    }
    return {"name": name, "size": len(plain), "codec": codec} | {key: value.hex() for key, value in raw.items()}


def refusals(good: dict[str, Any]) -> list[dict[str, Any]]:
    """Reads that must fail: the good chunk with one thing changed. `reason` is this project's word for the check."""
    m, stored, size = bytes.fromhex(good["M"]), bytes.fromhex(good["stored"]), good["size"]
    base = {"M": good["M"], "d": good["d"], "size": size, "codec": good["codec"], "stored": good["stored"]}

    def sealed(compressed: bytes, claimed: int = size, codec: int = ZSTD) -> dict[str, Any]:
        """Validly sealed by a holder of the key, with content that must not be accepted."""
        aad = b"sealed-rafs/1" + claimed.to_bytes(4, "little") + bytes([codec])
        nonce = hmac_sha256(m, b"nonce" + aad + compressed)[:12]
        value = nonce + AESGCM(hmac_sha256(m, b"key")).encrypt(nonce, compressed, aad)
        return {"stored": value.hex(), "size": claimed, "codec": codec}

    def flipped(at: int) -> dict[str, Any]:
        changed = bytearray(stored)
        changed[at] ^= 1
        return {"stored": changed.hex()}

    frame = ZSTD_A_4096
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("a bit of the nonce", "chunk-tag", flipped(0)),
        ("a bit of the ciphertext", "chunk-tag", flipped(12)),
        ("a bit of the tag", "chunk-tag", flipped(len(stored) - 1)),
        ("cut by one byte", "chunk-tag", {"stored": stored[:-1].hex()}),
        ("one byte more", "chunk-tag", {"stored": (stored + b"\0").hex()}),
        ("another size", "chunk-tag", {"size": size - 1}),
        ("another codec", "chunk-tag", {"codec": LZ4}),
        ("another M", "chunk-tag", {"M": hashlib.sha256(m).hexdigest()}),
        ("another digest", "chunk-digest", {"d": bytes(32).hex()}),
        ("no ciphertext", "chunk-size", {"stored": stored[:28].hex()}),
        ("size zero", "chunk-size", {"size": 0}),
        ("size above 8 MiB", "chunk-size", {"size": (8 << 20) + 1}),
        ("codec none of another length", "chunk-size", {"codec": NONE}),
        ("codec gzip", "chunk-codec", sealed(frame, codec=2)),
        ("not a zstd frame", "chunk-codec", sealed(b"not zstd")),
        ("bytes behind the frame", "chunk-codec", sealed(frame + b"\0")),
        ("a second, empty frame", "chunk-codec", sealed(frame + bytes.fromhex("28b52ffd2000010000"))),
        ("a skippable frame in front", "chunk-codec", sealed(bytes.fromhex("502a4d1801000000") + b"x" + frame)),
        ("content size not stated", "chunk-codec", sealed(bytes.fromhex("28b52ffd 00 58 038000 41"))),
        ("content size of another length", "chunk-codec", sealed(bytes.fromhex("28b52ffd 60 010f 0b8000 41"))),
        ("a dictionary", "chunk-codec", sealed(bytes.fromhex("28b52ffd 61 07 000f 038000 41"))),
        ("a window of 128 MiB", "chunk-codec", sealed(bytes.fromhex("28b52ffd 40 88 000f 038000 41"))),
    ]
    return [{"name": name, "reason": reason} | base | change for name, reason, change in rows]


def layer() -> dict[str, str]:
    """AES_256_CTR_HMAC_SHA256 with a counter that wraps."""
    key, nonce, plain = b"01234567890123456789012345678912", b"\xff" * 16, b"this is some data" * 4
    cipher = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor().update(plain)
    b64 = {name: base64.b64encode(value).decode() for name, value in (("key", key), ("nonce", nonce))}
    mac = base64.b64encode(hmac_sha256(key, cipher)).decode()
    digest = hashlib.sha256(plain).hexdigest()
    public = '{"cipher":"AES_256_CTR_HMAC_SHA256","hmac":"' + mac + '","cipheroptions":{}}'
    return {
        "plain": plain.hex(),
        "cipher": cipher.hex(),
        "private_options": f'{{"symkey":"{b64["key"]}","digest":"sha256:{digest}",'
        f'"cipheroptions":{{"nonce":"{b64["nonce"]}"}}}}',
        "public_options": public,
        "pubopts_annotation": base64.b64encode(public.encode()).decode(),
    }


def vectors() -> dict[str, Any]:
    chunks = [
        chunk("none", IMAGE_SECRET, b"sealed-rafs", NONE, b"sealed-rafs"),
        chunk("lz4_block", IMAGE_SECRET, ABCD_32, LZ4, LZ4_ABCD_32),
        chunk("zstd", IMAGE_SECRET, A_4096, ZSTD, ZSTD_A_4096),
        chunk("zstd, public domain", PUBLIC_SECRET, A_4096, ZSTD, ZSTD_A_4096),
        chunk("the same content, stored as it is", IMAGE_SECRET, ABCD_32, NONE, ABCD_32),
    ]
    return {"chunks": chunks, "refused": refusals(chunks[2]), "layer": layer()}


def text() -> str:
    return json.dumps(vectors(), indent=1) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("crypto.json").write_text(text())
