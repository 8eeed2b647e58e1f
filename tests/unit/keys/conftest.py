"""Key pairs of every supported kind, made once."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


@dataclass(frozen=True)
class Pair:
    """A key pair in files, and as a library object."""

    private: Path
    public: Path
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

    @property
    def spki(self) -> bytes:
        return self.public.read_bytes()


def write_pair(
    directory: Path,
    name: str,
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey,
    form: PrivateFormat = PrivateFormat.PKCS8,
) -> Pair:
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return Pair(private, public, key)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    directory = tmp_path_factory.mktemp("keys")
    keys: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = {
        "rsa-2048": rsa.generate_private_key(65537, 2048),
        "rsa-4096": rsa.generate_private_key(65537, 4096),
        "p-256": ec.generate_private_key(ec.SECP256R1()),
        "p-384": ec.generate_private_key(ec.SECP384R1()),
        "p-521": ec.generate_private_key(ec.SECP521R1()),
        "stranger": ec.generate_private_key(ec.SECP256R1()),
        "rsa-stranger": rsa.generate_private_key(65537, 2048),
    }
    return {name: write_pair(directory, name, key) for name, key in keys.items()}
