"""tests/vectors/crypto.json, made without the package: what a second implementation must compute and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from snapshotter.crypto import chunk, layer
from snapshotter.crypto.layer import LayerPrivate, LayerPublic
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import IntegrityError
from tests.vectors import make_crypto

FILE = Path(__file__).parents[2] / "vectors" / "crypto.json"
VECTORS: dict[str, Any] = json.loads(FILE.read_text())


def test_the_file_is_what_its_script_writes() -> None:
    assert FILE.read_text() == make_crypto.text()


@pytest.mark.parametrize("vector", VECTORS["chunks"], ids=lambda vector: vector["name"])
def test_chunks(vector: dict[str, Any]) -> None:
    raw = {name: bytes.fromhex(vector[name]) for name in ("S", "p", "d", "M", "c", "stored", "id")}
    size, codec = vector["size"], vector["codec"]
    assert chunk.derive(raw["S"], raw["d"]) == raw["M"]
    assert chunk.seal(raw["M"], raw["c"], size, codec) == raw["stored"]
    assert chunk.open_(raw["M"], raw["stored"], size, codec) == raw["c"]
    assert chunk.chunk_id(raw["M"], codec, len(raw["stored"])) == raw["id"]
    assert chunk.decode(raw["stored"], digest=raw["d"], size=size, codec=codec, sealed_secret=raw["M"]) == raw["p"]


def test_one_content_in_two_codecs_has_one_key_two_nonces_and_two_ids() -> None:
    packed, plain = VECTORS["chunks"][1], VECTORS["chunks"][4]
    assert packed["K"] == plain["K"]
    assert packed["N"] != plain["N"]
    assert packed["id"] != plain["id"]


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda vector: vector["name"])
def test_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError) as caught:
        chunk.decode(
            bytes.fromhex(vector["stored"]),
            digest=bytes.fromhex(vector["d"]),
            size=vector["size"],
            codec=vector["codec"],
            sealed_secret=bytes.fromhex(vector["M"]),
        )
    assert caught.value.reason == vector["reason"]


def test_layer() -> None:
    vector = VECTORS["layer"]
    public = LayerPublic.parse(vector["public_options"].encode())
    private = LayerPrivate.parse(SecretBytes(vector["private_options"].encode()))
    cipher, plain = bytes.fromhex(vector["cipher"]), bytes.fromhex(vector["plain"])
    assert layer.decrypt_verified(cipher, private, public) == plain
    assert layer.encrypt_with(plain, private) == (cipher, public)
    assert public.pack() == vector["public_options"].encode()
    assert private.pack().expose() == vector["private_options"].encode()
