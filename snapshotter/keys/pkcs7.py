"""CMS EnvelopedData (RFC 5652 §6) of layer keys, as ocicrypt writes and reads it for `pkcs7:` recipients.

ocicrypt uses RSA with PKCS#1 v1.5 padding and AES-GCM content, in a slightly odd DER: the algorithm parameters carry
their own SEQUENCE with the constructed bit cleared, the nonce is tagged [4], and the content is explicitly tagged.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from cryptography import x509
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snapshotter import labels
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, LimitExceeded, MalformedImage

_ENVELOPED_DATA: Final = bytes.fromhex("2a864886f70d010703")
_RSA: Final = bytes.fromhex("2a864886f70d010101")
_DATA: Final = bytes.fromhex("2a864886f70d010701")
_AES_128_GCM: Final = bytes.fromhex("608648016503040106")
_KEY_BYTES: Final = {bytes.fromhex("60864801650304012e"): 32, _AES_128_GCM: 16}  # AES-GCM
_INTEGER, _OCTETS, _OID, _SEQUENCE, _SET = 0x02, 0x04, 0x06, 0x30, 0x31
_EXPLICIT_0, _NONCE_4 = 0xA0, 0x84
_CONSTRUCTED = 0x20
_PACKET_BYTES = 64 << 10
_MIN_RSA_BITS = 2048


@dataclass(frozen=True, slots=True)
class Certificate:
    """A recipient: whoever has the private key of an X.509 certificate (RSA)."""

    certificate: x509.Certificate

    annotation: ClassVar[str] = labels.ENC_KEYS_PKCS7

    @classmethod
    def load(cls, pem: bytes) -> "Certificate":
        """Raises InvalidArgument for what is no PEM certificate of an RSA key of at least 2048 bits."""
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            key = certificate.public_key()
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size < _MIN_RSA_BITS:
            raise InvalidArgument("not a PEM certificate of an RSA key of at least 2048 bits")
        return cls(certificate)

    def wrap(self, options: SecretBytes) -> bytes:
        """A packet for this recipient alone: AES-128-GCM under a key that RSA wraps, in the DER of ocicrypt."""
        cek, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
        key = self.certificate.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        issuer = _der(_SEQUENCE, self.certificate.issuer.public_bytes() + _integer(self.certificate.serial_number))
        wrapped = _der(_OCTETS, key.encrypt(cek, padding.PKCS1v15()))
        recipient = _der(_SEQUENCE, _integer(0) + issuer + _der(_SEQUENCE, _der(_OID, _RSA)) + wrapped)
        parameters = _der(_SEQUENCE, _der(_NONCE_4, nonce) + _integer(16))
        algorithm = _der(_SEQUENCE, _der(_OID, _AES_128_GCM) + _der(_SEQUENCE & ~_CONSTRUCTED, parameters))
        content = _der(_OCTETS, AESGCM(cek).encrypt(nonce, options.expose(), None))
        encrypted = _der(_SEQUENCE, _der(_OID, _DATA) + algorithm + _der(_EXPLICIT_0, content))
        enveloped = _der(_SEQUENCE, _integer(0) + _der(_SET, recipient) + encrypted)
        return _der(_SEQUENCE, _der(_OID, _ENVELOPED_DATA) + _der(_EXPLICIT_0, enveloped))


def _der(tag: int, body: bytes) -> bytes:
    size = len(body)
    if size < 0x80:
        return bytes((tag, size)) + body
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + body


def _integer(value: int) -> bytes:
    return _der(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def unwrap(packet: bytes, keys: Sequence[rsa.RSAPrivateKey], *, max_recipients: int = 64) -> SecretBytes | None:
    """The payload by the first key that opens it, None if none does. Raises MalformedImage, LimitExceeded.

    Recipients are not matched by certificate: every key is tried on every one. A key that does not fit yields a random
    content key (implicit rejection), which the GCM tag then refuses, so errors say nothing about the padding.
    """
    if len(packet) > _PACKET_BYTES:
        raise LimitExceeded(f"PKCS#7 packet: larger than {_PACKET_BYTES} bytes")
    wrapped, key_bytes, nonce, content = _parse(packet)
    if len(wrapped) > max_recipients:
        raise LimitExceeded("PKCS#7 packet: more recipients than limits.recipients")
    for key in keys:
        for encrypted_key in wrapped:
            if len(encrypted_key) != key.key_size // 8:
                continue
            try:
                cek = key.decrypt(encrypted_key, padding.PKCS1v15())
                if len(cek) == key_bytes:
                    return SecretBytes(AESGCM(cek).decrypt(nonce, content, None))
            except (InvalidTag, ValueError):
                continue
    return None


def _parse(packet: bytes) -> tuple[list[bytes], int, bytes, bytes]:
    """The wrapped keys, the length of the content key, the nonce, and the content with its tag."""
    kind, wrapper = _fields(_single(packet, _SEQUENCE), _OID, _EXPLICIT_0)
    if kind != _ENVELOPED_DATA:
        raise MalformedImage("PKCS#7 packet: not EnvelopedData")
    _, recipients, content_info = _fields(_single(wrapper, _SEQUENCE), _INTEGER, _SET, _SEQUENCE)
    _, algorithm, tagged = _fields(content_info, _OID, _SEQUENCE, _EXPLICIT_0)
    (tag, oid), (_, parameters) = _pair(algorithm)
    if tag != _OID or oid not in _KEY_BYTES:
        raise MalformedImage("PKCS#7 packet: content is not encrypted with AES-GCM")
    nonce, tag_length = _fields(_single(parameters, _SEQUENCE), _NONCE_4, _INTEGER)
    if len(nonce) != 12 or tag_length != b"\x10":
        raise MalformedImage("PKCS#7 packet: nonce is not 12 bytes or the tag not 16")
    return (
        [_wrapped_key(body) for body in _all(recipients, _SEQUENCE)],
        _KEY_BYTES[oid],
        nonce,
        _single(tagged, _OCTETS),
    )


def _wrapped_key(recipient: bytes) -> bytes:
    _, _, algorithm, key = _fields(recipient, _INTEGER, _SEQUENCE, _SEQUENCE, _OCTETS)
    elements = list(_elements(algorithm))
    if not elements or elements[0] != (_OID, _RSA):
        raise MalformedImage("PKCS#7 packet: a key is not wrapped with RSA")
    return key


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and body of the DER elements one after another; definite lengths of at most two bytes."""
    at = 0
    while at < len(data):
        header = data[at : at + 4]
        if len(header) < 2 or header[0] & 0x1F == 0x1F:
            raise MalformedImage("PKCS#7 packet: not DER")
        extra = header[1] - 0x80 if header[1] > 0x7F else 0
        if extra > 2 or header[1] == 0x80 or len(header) < 2 + extra:
            raise MalformedImage("PKCS#7 packet: not DER")
        size = int.from_bytes(header[2 : 2 + extra], "big") if extra else header[1]
        start = at + 2 + extra
        at = start + size
        if at > len(data):
            raise MalformedImage("PKCS#7 packet: cut short")
        yield header[0], data[start:at]


def _all(data: bytes, tag: int) -> list[bytes]:
    found = list(_elements(data))
    if any(actual != tag for actual, _ in found):
        raise MalformedImage("PKCS#7 packet: not what ocicrypt writes")
    return [body for _, body in found]


def _fields(data: bytes, *tags: int) -> list[bytes]:
    """Bodies of exactly these elements."""
    found = list(_elements(data))
    if [tag for tag, _ in found] != list(tags):
        raise MalformedImage("PKCS#7 packet: not what ocicrypt writes")
    return [body for _, body in found]


def _single(data: bytes, tag: int) -> bytes:
    return _fields(data, tag)[0]


def _pair(data: bytes) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    found = list(_elements(data))
    if len(found) != 2:
        raise MalformedImage("PKCS#7 packet: not what ocicrypt writes")
    return found[0], found[1]
