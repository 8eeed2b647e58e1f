"""The error tree: each class knows its gRPC status, the errno a reader sees, the exit code of the CLI, and a `reason`.

The message is for people and names the object and the failed check; `reason` is for machines and is one word of the
stable list in docs/architecture.md. Messages never hold a key, a token or a plaintext digest.
"""

import errno as _errno
from typing import ClassVar


class SnapshotterError(Exception):
    """Root of everything this package raises on purpose."""

    status: ClassVar[str] = "INTERNAL"  # name of a grpc.StatusCode
    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1
    default_reason: ClassVar[str] = "internal"

    def __init__(self, message: str, *, reason: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason
        self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} ({self.hint})" if self.hint else text


class InvalidArgument(SnapshotterError):
    """The caller asked for something that can never be right."""

    status = "INVALID_ARGUMENT"
    errno = _errno.EINVAL
    exit_code = 2
    default_reason = "invalid-argument"


class ConfigError(InvalidArgument):
    """The configuration file or a flag is wrong."""

    default_reason = "config"


class BadReference(InvalidArgument):
    """Not an image reference of the distribution grammar."""

    default_reason = "reference"


class NotFound(SnapshotterError):
    """No such snapshot, image, blob or file."""

    status = "NOT_FOUND"
    errno = _errno.ENOENT
    exit_code = 3
    default_reason = "not-found"


class AlreadyExists(SnapshotterError):
    """The key or name is taken, or a remote snapshot is ready."""

    status = "ALREADY_EXISTS"
    errno = _errno.EEXIST
    exit_code = 4
    default_reason = "already-exists"


class FailedPrecondition(SnapshotterError):
    """Right request, wrong state: snapshot has children, wrong kind, wrong setting."""

    status = "FAILED_PRECONDITION"
    errno = _errno.EBUSY
    exit_code = 5
    default_reason = "failed-precondition"


class Unavailable(SnapshotterError):
    """Something this depends on does not answer; the same call may succeed later."""

    status = "UNAVAILABLE"
    exit_code = 10
    default_reason = "unavailable"


class RegistryUnavailable(Unavailable):
    """The registry is unreachable, stalls, or answers 429 or 5xx."""

    default_reason = "registry"


class Unauthorized(SnapshotterError):
    """Somebody says no."""

    status = "PERMISSION_DENIED"
    errno = _errno.EACCES
    exit_code = 11
    default_reason = "denied"


class RegistryDenied(Unauthorized):
    """The registry answers 401 or 403 and the credentials do not help."""

    default_reason = "registry-denied"


class PolicyDenied(Unauthorized):
    """The image policy refuses the image (reasons: unauthentic-image, not-sealed)."""

    default_reason = "unauthentic-image"


class KeyDenied(Unauthorized):
    """None of our keys opens the image, or the key broker refuses."""

    default_reason = "no-key"


class IntegrityError(SnapshotterError):
    """Bytes are not what they were promised to be. Never retried on the same bytes."""

    status = "DATA_LOSS"
    exit_code = 20
    default_reason = "integrity"


class DigestMismatch(IntegrityError):
    """Content does not have the digest or size of its descriptor."""

    default_reason = "digest-mismatch"


class DecryptError(IntegrityError):
    """Authentication of ciphertext failed (layer HMAC or chunk tag)."""

    default_reason = "layer-hmac"


class MalformedImage(IntegrityError):
    """A bootstrap, table, manifest or archive breaks its format."""

    default_reason = "bad-bootstrap"


class BadLayer(MalformedImage):
    """A source layer is not a tar archive that could be unpacked."""

    default_reason = "bad-layer"


class LimitExceeded(SnapshotterError):
    """Remote input is larger than a row of [limits] allows."""

    status = "RESOURCE_EXHAUSTED"
    exit_code = 12
    default_reason = "limit"


class Exhausted(SnapshotterError):
    """A local disk or quota is full."""

    status = "RESOURCE_EXHAUSTED"
    errno = _errno.ENOSPC
    exit_code = 12
    default_reason = "no-space"
