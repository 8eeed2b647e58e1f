"""OpenPGP signatures, verified by GnuPG's `gpgv`: the message in a signed message, if one of some keys signed it."""

import asyncio
import base64
import binascii
import resource
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from snapshotter import programs
from snapshotter.errors import ConfigError, Unavailable
from snapshotter.files import read_regular
from snapshotter.image.signature import CLAIM_BYTES

_SECONDS = 20.0
_CPU_SECONDS = 2  # a verification takes milliseconds, but a small message may be a large one, packed
_STATUS_BYTES = 64 << 10
_ARMOR = b"-----BEGIN PGP PUBLIC KEY BLOCK-----"


async def signed_message(message: bytes, keyring: Sequence[bytes]) -> bytes | None:
    """What `message` (opaque, signed, not encrypted) holds; None unless a key of `keyring` made a good signature.

    None as well for more than `CLAIM_BYTES`. Keys are OpenPGP public keys, binary or armored. Raises ConfigError where
    there is no gpgv, Unavailable if it hangs.
    """
    program = shutil.which("gpgv")
    if program is None:
        raise ConfigError("policy: signedBy needs the program gpgv (Debian package gpgv)")
    with tempfile.TemporaryDirectory(prefix="coco-gpgv-") as directory:
        ring, source, target = (Path(directory) / name for name in ("ring.gpg", "signature", "message"))
        ring.write_bytes(b"".join(map(_binary, keyring)))
        source.write_bytes(message)
        command = [program, "--homedir", directory, "--keyring", str(ring), "--status-fd", "1", "--output", str(target)]
        try:
            code, status = await programs.ask(
                [*command, str(source)], b"", limit=_STATUS_BYTES, seconds=_SECONDS, environment={"LC_ALL": "C"},
                rlimits={resource.RLIMIT_FSIZE: CLAIM_BYTES, resource.RLIMIT_CPU: _CPU_SECONDS},
            )  # fmt: skip
        except (TimeoutError, OSError):
            raise Unavailable("gpgv does not answer") from None
        except programs.TooLong:
            return None
        lines = status.decode(errors="replace").splitlines()
        words = [line.split()[1] for line in lines if line.startswith("[GNUPG:] ")]
        # One signature, and a good one: not expired, not revoked, not one of two that only gpgv tells apart.
        if code or words.count("NEWSIG") != 1 or words.count("GOODSIG") != 1 or "VALIDSIG" not in words:
            return None
        return await asyncio.to_thread(read_regular, target, CLAIM_BYTES)


def _binary(key: bytes) -> bytes:
    """Without its armor (RFC 4880 §6.2), which gpgv does not read. Raises ConfigError."""
    if not key.lstrip().startswith(_ARMOR):
        return key
    lines = key.decode(errors="replace").replace("\r", "").strip().split("\n")
    try:
        begin = lines.index("") + 1
        body = [line for line in lines[begin:-1] if line and not line.startswith("=")]
        return base64.b64decode("".join(body), validate=True)
    except (ValueError, binascii.Error):
        raise ConfigError("policy: a GPG key has a broken armor") from None
