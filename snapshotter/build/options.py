"""What a conversion was asked to do, checked before anything is read."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from snapshotter.build.chunker import DEFAULT_CHUNK_SIZE, DEFAULT_CODEC, Codec, check_chunk_size
from snapshotter.crypto.chunk import domain_secret_public
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, MalformedImage
from snapshotter.keys.ocicrypt import Recipient
from snapshotter.keys.packet import Kek
from snapshotter.keys.pkcs7 import Certificate
from snapshotter.keys.protocol import ProviderKeys
from snapshotter.keys.resource import ResourceUri

Domain: TypeAlias = Literal["image", "tenant", "public"]
RECIPIENT: Final = "jwe:PUBLIC.pem, pkcs7:CERTIFICATE.pem, kbs:///repository/type/tag=KEKFILE or provider:NAME[:TEXT]"
_HEX_SECRET = re.compile(rb"[0-9a-fA-F]{64}\n?")
_MAX_PEM = 64 << 10
_MAX_SECONDS = 253_402_300_799  # the year 9999, where RFC 3339 ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Either `recipients` (a sealed image) or `plain` (a Nydus image that is not confidential)."""

    recipients: tuple[Recipient, ...] = ()
    plain: bool = False
    domain: Domain = "image"
    secret: SecretBytes = field(repr=False)  # S of the domain; unused when plain
    chunk_size: int = DEFAULT_CHUNK_SIZE
    codec: Codec = DEFAULT_CODEC
    platform: str
    hide_config: Literal["all", "none"] = "none"
    trace: tuple[bytes, ...] = ()  # paths in order of first use
    repository: str = ""  # host/repository the image is made for, "" = not said
    created: int  # seconds since the epoch
    directory_mtime_ns: int = 0  # of directories that no layer describes

    def __post_init__(self) -> None:
        if self.plain == bool(self.recipients):
            raise InvalidArgument(
                f"choose what to make: give --recipient {RECIPIENT} for a sealed image (once per reader), or --plain "
                "for a Nydus image that everybody can read"
            )
        check_chunk_size(self.chunk_size)
        if not 0 <= self.created <= _MAX_SECONDS:
            raise InvalidArgument("SOURCE_DATE_EPOCH: must be seconds between 1970 and 9999")


def convergence_secret(domain: str, path: Path | None, random: bytes) -> SecretBytes:
    """S of a domain: `random` for image, the file's 32 bytes or 64 hex digits for tenant. Raises InvalidArgument."""
    if (domain == "tenant") != (path is not None):
        raise InvalidArgument("--convergence-secret FILE and --domain tenant belong together")
    if domain == "public":
        return SecretBytes(domain_secret_public())
    if path is None:
        return SecretBytes(random)
    try:
        with path.open("rb") as file:
            content = file.read(100)
    except OSError as error:
        raise InvalidArgument(f"convergence secret {path}: {error.strerror}") from error
    if len(content) == 32:
        return SecretBytes(content)
    if _HEX_SECRET.fullmatch(content):
        return SecretBytes(bytes.fromhex(content.decode()))
    raise InvalidArgument(f"convergence secret {path}: must be 32 raw bytes or 64 hex digits")


def load_recipient(text: str, ocicrypt_config: str = "") -> Recipient:
    """What a `--recipient` stands for, see RECIPIENT; `ocicrypt_config` names key providers, "" for none.

    Raises InvalidArgument, ConfigError.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "provider" and rest:
        if not ocicrypt_config:
            raise InvalidArgument(f"recipient {text!r}: needs [keys] ocicrypt_config in the file of --config")
        name, _, told = rest.partition(":")
        return ProviderKeys.load(Path(ocicrypt_config)).recipient(name, told)
    if scheme == "kbs" and "=" in rest:
        return load_kek(text)
    if scheme not in ("jwe", "pkcs7") or not rest:
        raise InvalidArgument(f"recipient {text!r}: write {RECIPIENT}")
    pem = _read(rest, _MAX_PEM)
    if b"PRIVATE" in pem:
        raise InvalidArgument(f"recipient {rest}: this is a private key; give the public one")
    if scheme == "jwe":
        return pem
    try:
        return Certificate.load(pem)
    except InvalidArgument as error:
        raise InvalidArgument(f"recipient {rest}: {error}") from None


def load_kek(text: str) -> Kek:
    """`kbs:///repository/type/tag=FILE`. Raises InvalidArgument."""
    name, _, path = text.partition("=")
    try:
        return Kek.load(ResourceUri.parse(name), Path(path))
    except MalformedImage as error:
        raise InvalidArgument(f"recipient {name!r}: {error}") from None


def _read(path: str, limit: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise InvalidArgument(f"recipient {path}: {error.strerror}") from error
    except ValueError:
        raise InvalidArgument(f"recipient {path!r}: not a file name") from None
