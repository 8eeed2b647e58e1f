"""PKCS#7 packets of ocicrypt: read as skopeo writes them, and nothing else."""

import base64
import contextlib
import datetime
import gzip
import hashlib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.errors import KeyDenied, LimitExceeded, MalformedImage, SnapshotterError
from snapshotter.keys import ocicrypt, pkcs7
from snapshotter.keys.provider import FileKeys
from tests.unit.keys.conftest import Pair
from tests.unit.keys.test_skopeo_interop import Layout, skopeo

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, Pair]) -> dict[str, Path]:
    directory, made = tmp_path_factory.mktemp("certificates"), {}
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    for kind in ("rsa-2048", "rsa-4096"):
        key = pairs[kind].key
        assert isinstance(key, rsa.RSAPrivateKey)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, kind)])
        builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        certificate = (
            builder.not_valid_before(now)
            .not_valid_after(now + datetime.timedelta(days=36500))
            .sign(key, hashes.SHA256())
        )
        made[kind] = directory / f"{kind}.crt"
        made[kind].write_bytes(certificate.public_bytes(Encoding.PEM))
    return made


Made = tuple[bytes, bytes, dict[str, str]]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory, certificates: dict[str, Path]) -> Made:
    """Plaintext, ciphertext and annotations of a layer that skopeo encrypted to two certificates."""
    directory = tmp_path_factory.mktemp("layer")
    tar = bytes(10240)
    plain = gzip.compress(tar, mtime=0)
    source = Layout.create(directory / "plain", plain, "sha256:" + hashlib.sha256(tar).hexdigest())
    options = [option for path in certificates.values() for option in ("--encryption-key", f"pkcs7:{path}")]
    result = skopeo(*options, f"oci:{source.path}:t", f"oci:{directory}/e:t")
    assert result.returncode == 0, result.stderr
    descriptor, cipher = Layout(directory / "e").layer()
    return plain, cipher, descriptor["annotations"]


def packet_of(layer: Made) -> bytes:
    return base64.b64decode(layer[2][labels.ENC_KEYS_PKCS7])


def rsa_key(pair: Pair) -> rsa.RSAPrivateKey:
    assert isinstance(pair.key, rsa.RSAPrivateKey)
    return pair.key


@pytest.mark.parametrize("kind", ["rsa-2048", "rsa-4096"])
async def test_every_recipient_opens_what_skopeo_encrypted(layer: Made, pairs: dict[str, Pair], kind: str) -> None:
    plain, cipher, annotations = layer
    provider = FileKeys([pairs["p-256"].private, pairs["rsa-stranger"].private, pairs[kind].private])
    assert await ocicrypt.decrypt_layer(cipher, annotations, provider, Limits()) == plain


async def test_others_do_not(layer: Made, pairs: dict[str, Pair]) -> None:
    provider = FileKeys([pairs["p-256"].private, pairs["rsa-stranger"].private])
    with pytest.raises(KeyDenied, match="none of 2 private keys") as caught:
        await ocicrypt.decrypt_layer(*layer[1:], provider, Limits())
    assert caught.value.reason == "no-key"


def test_every_changed_or_missing_byte_opens_nothing(layer: Made, pairs: dict[str, Pair]) -> None:
    """Except where a byte only names the recipient or a version: those decide nothing here."""
    packet, key = packet_of(layer), rsa_key(pairs["rsa-2048"])
    payload = pkcs7.unwrap(packet, [key])
    assert payload is not None
    for at in range(0, len(packet), 7):
        changed = bytearray(packet)
        changed[at] ^= 0x41
        for candidate in (bytes(changed), packet[:at]):
            with contextlib.suppress(MalformedImage):
                opened = pkcs7.unwrap(candidate, [key])
                assert opened is None or opened == payload


def test_bounds(layer: Made, pairs: dict[str, Pair]) -> None:
    with pytest.raises(LimitExceeded, match="recipients"):
        pkcs7.unwrap(packet_of(layer), [rsa_key(pairs["rsa-2048"])], max_recipients=1)
    with pytest.raises(LimitExceeded):
        pkcs7.unwrap(bytes(70_000), [])


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with contextlib.suppress(SnapshotterError):
        pkcs7.unwrap(raw, [])
