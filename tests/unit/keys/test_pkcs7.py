"""PKCS#7 packets of ocicrypt: read as skopeo writes them and nothing else, and written as it reads them."""

import base64
import contextlib
import datetime
import gzip
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from snapshotter import labels
from snapshotter.build.options import load_recipient
from snapshotter.config import Limits
from snapshotter.errors import InvalidArgument, KeyDenied, LimitExceeded, MalformedImage, SnapshotterError
from snapshotter.keys import ocicrypt, pkcs7
from snapshotter.keys.pkcs7 import Certificate
from snapshotter.keys.provider import FileKeys
from tests.unit.keys.conftest import Pair
from tests.unit.keys.test_skopeo_interop import Layout, skopeo

pytestmark = pytest.mark.real


def certificate_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, name: str) -> bytes:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    ends = now + datetime.timedelta(days=36500)
    certificate = builder.not_valid_before(now).not_valid_after(ends).sign(key, hashes.SHA256())
    return certificate.public_bytes(Encoding.PEM)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, Pair]) -> dict[str, Path]:
    directory, made = tmp_path_factory.mktemp("certificates"), {}
    for kind in ("rsa-2048", "rsa-4096"):
        made[kind] = directory / f"{kind}.crt"
        made[kind].write_bytes(certificate_of(pairs[kind].key, kind))
    return made


Made = tuple[bytes, bytes, dict[str, str]]


def encrypted_by_skopeo(directory: Path, certificates: Iterable[Path]) -> Made:
    """Plaintext, ciphertext and annotations."""
    tar = bytes(10240)
    plain = gzip.compress(tar, mtime=0)
    source = Layout.create(directory / "plain", plain, "sha256:" + hashlib.sha256(tar).hexdigest())
    options = [option for path in certificates for option in ("--encryption-key", f"pkcs7:{path}")]
    result = skopeo(*options, f"oci:{source.path}:t", f"oci:{directory}/e:t")
    assert result.returncode == 0, result.stderr
    descriptor, cipher = Layout(directory / "e").layer()
    return plain, cipher, descriptor["annotations"]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory, certificates: dict[str, Path]) -> Made:
    """A layer that skopeo encrypted to two certificates."""
    return encrypted_by_skopeo(tmp_path_factory.mktemp("layer"), certificates.values())


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


@pytest.mark.parametrize("kind", ["rsa-2048", "rsa-4096"])
async def test_skopeo_and_we_open_what_we_wrapped(
    tmp_path: Path, certificates: dict[str, Path], pairs: dict[str, Pair], kind: str
) -> None:
    """ocicrypt finds its recipient by the certificate, which skopeo takes as another `--decryption-key`."""
    tar = bytes(10240)
    plain = gzip.compress(tar, mtime=0)
    cipher, annotations = ocicrypt.encrypt_layer(
        plain, [load_recipient(f"pkcs7:{path}") for path in certificates.values()]
    )
    assert set(annotations) == {labels.ENC_KEYS_PKCS7, labels.ENC_PUBOPTS}
    ours = Layout.create(
        tmp_path / "ours",
        cipher,
        "sha256:" + hashlib.sha256(tar).hexdigest(),
        mediaType=labels.MEDIA_LAYER_GZIP_ENCRYPTED,
        annotations=annotations,
    )
    certificate = certificates[kind]
    for name, opens in ((kind, True), ("rsa-stranger", False)):
        key = pairs[name].private
        result = skopeo(
            "--decryption-key", key, "--decryption-key", certificate, f"oci:{ours.path}:t", f"oci:{tmp_path / name}:t"
        )
        assert (result.returncode == 0) == opens, result.stderr
        if opens:
            assert Layout(tmp_path / name).layer()[1] == plain
            assert await ocicrypt.decrypt_layer(cipher, annotations, FileKeys([key]), Limits()) == plain


def test_our_packets_have_the_form_of_those_of_skopeo(
    tmp_path: Path, certificates: dict[str, Path], pairs: dict[str, Pair]
) -> None:
    """The same structure, names and lengths; only what is random differs."""

    def shape(packet: bytes) -> list[str]:
        command = ["openssl", "asn1parse", "-inform", "der"]
        shown = subprocess.run(command, input=packet, capture_output=True, check=True).stdout.decode()
        return [line.partition("[HEX DUMP]")[0] for line in shown.splitlines()]

    certificate = certificates["rsa-2048"]
    theirs = packet_of(encrypted_by_skopeo(tmp_path, [certificate]))
    options = pkcs7.unwrap(theirs, [rsa_key(pairs["rsa-2048"])])
    assert options is not None
    assert shape(Certificate.load(certificate.read_bytes()).wrap(options)) == shape(theirs)


def test_certificates_that_are_none(tmp_path: Path, pairs: dict[str, Pair], certificates: dict[str, Path]) -> None:
    (tmp_path / "none").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (tmp_path / "ec").write_bytes(certificate_of(pairs["p-256"].key, "ec"))
    (tmp_path / "short").write_bytes(certificate_of(rsa.generate_private_key(65537, 1024), "short"))
    for wrong in (tmp_path / "none", tmp_path / "ec", tmp_path / "short", pairs["rsa-2048"].public):
        with pytest.raises(InvalidArgument, match=f"recipient {wrong}: not a PEM certificate"):
            load_recipient(f"pkcs7:{wrong}")
    with pytest.raises(InvalidArgument, match="private key"):
        load_recipient(f"pkcs7:{pairs['rsa-2048'].private}")


def test_bounds(layer: Made, pairs: dict[str, Pair]) -> None:
    with pytest.raises(LimitExceeded, match="recipients"):
        pkcs7.unwrap(packet_of(layer), [rsa_key(pairs["rsa-2048"])], max_recipients=1)
    with pytest.raises(LimitExceeded):
        pkcs7.unwrap(bytes(70_000), [])


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with contextlib.suppress(SnapshotterError):
        pkcs7.unwrap(raw, [])
