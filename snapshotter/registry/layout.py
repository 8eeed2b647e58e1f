"""An OCI image layout directory as source and target of images (image-spec v1.1, image-layout.md).

A layout may come from anybody: blobs are opened below the directory without following links, must be regular files of
the size they should have, and are checked like those of a registry. Names inside come from checked digests only.
"""
# ruff: noqa: ARG002 - the same methods as a registry, where blobs belong to a repository

import asyncio
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import (
    BadReference,
    DigestMismatch,
    InvalidArgument,
    LimitExceeded,
    MalformedImage,
    NotFound,
    SnapshotterError,
)
from snapshotter.files import sync_directory, write_atomic
from snapshotter.registry.reference import Reference
from snapshotter.registry.upload import BlobContent, CheckedContent

REF_NAME = "org.opencontainers.image.ref.name"
_VERSION = b'{"imageLayoutVersion":"1.0.0"}'
_READ_BYTES = 1 << 20
_FOLLOW_NOTHING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Entry(msgspec.Struct, frozen=True, rename="camel"):
    """A descriptor of index.json, as far as it is needed to find an image."""

    digest: str
    media_type: str = ""
    size: int = -1
    annotations: dict[str, str] = {}

    @property
    def name(self) -> str | None:
        return self.annotations.get(REF_NAME)


class _IndexFile(msgspec.Struct, frozen=True, rename="camel"):
    manifests: list[_Entry] = []


class OciLayout:
    """An `ImageSource` and `ImageTarget`. Of a reference only tag and digest count. Writing creates what is missing."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self._limits = limits

    async def manifest(self, reference: Reference) -> tuple[bytes, str, Digest]:
        """The document that the digest, else the tag (`org.opencontainers.image.ref.name`) names.

        Without either, the only image of the layout. Raises NotFound, BadReference when there are several.
        """
        return await asyncio.to_thread(self._manifest, reference)

    def _manifest(self, reference: Reference) -> tuple[bytes, str, Digest]:
        entries = self._index().manifests
        if reference.digest is not None:
            listed = [entry for entry in entries if entry.digest == reference.digest]
            # What only an index inside the layout names has no media type here; the document says its own.
            digest, media_type = reference.digest, listed[0].media_type if listed else ""
        else:
            entry = self._find(reference, entries)
            try:
                digest, media_type = Digest.parse(entry.digest), entry.media_type
            except InvalidArgument as error:
                raise MalformedImage(f"{self._path}: index.json: {error}") from error
        with self._blob(digest) as (file, size):
            if size > self._limits.manifest_bytes:
                raise LimitExceeded(
                    f"manifest {digest}: {size} is more than limits.manifest_bytes = {self._limits.manifest_bytes}"
                )
            raw = file.read(size + 1)
        if Digest.of(raw) != digest:
            raise DigestMismatch(f"manifest {digest} in {self._path}: got {Digest.of(raw)}")
        return raw, media_type, digest

    def _find(self, reference: Reference, entries: list[_Entry]) -> _Entry:
        if reference.tag is None:
            if len({entry.digest for entry in entries}) == 1:
                return entries[0]
            names = ", ".join(sorted({entry.name for entry in entries if entry.name})[:16])
            raise BadReference(f"{self._path}: holds {len(entries)} images, name one of: {names[:400]}")
        for entry in entries:
            if entry.name == reference.tag:
                return entry
        raise NotFound(f"{self._path}: no image {reference.tag!r}")

    async def blob(self, reference: Reference, digest: Digest, size: int, limit: int) -> bytes:
        """A whole verified blob."""
        if size > limit:
            raise LimitExceeded(f"blob {digest}: {size} bytes are more than the allowed {limit}")
        return b"".join([piece async for piece in self.blob_stream(reference, digest, size)])

    async def blob_stream(self, reference: Reference, digest: Digest, size: int) -> AsyncGenerator[bytes, None]:
        """A whole blob in pieces; DigestMismatch comes last."""
        hasher = hashlib.sha256()
        with self._blob(digest, size) as (file, _):
            while piece := await asyncio.to_thread(file.read, _READ_BYTES):
                hasher.update(piece)
                yield piece
        if hasher.hexdigest() != digest.hex:
            raise DigestMismatch(f"blob in {self._path}: expected {digest}, got sha256:{hasher.hexdigest()}")

    async def read_range(self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int) -> bytes:
        """Exactly `length` bytes of a blob; what they are is for the caller to verify."""
        if offset < 0 or length < 0 or offset + length > blob_size:
            raise InvalidArgument(f"blob {digest}: no bytes {offset}-{offset + length} in {blob_size}")

        def read() -> bytes:
            with self._blob(digest, blob_size) as (file, _):
                file.seek(offset)
                return file.read(length)

        content = await asyncio.to_thread(read)
        if len(content) != length:
            raise DigestMismatch(f"blob {digest} in {self._path}: became shorter than {blob_size} bytes")
        return content

    async def upload_blob(self, reference: Reference, digest: Digest, size: int, source: BlobContent) -> bool:
        """Store a blob; False if it is there in the right size. Raises DigestMismatch."""
        path = self._blob_path(digest)
        if path.is_file() and path.stat().st_size == size:
            return False
        await asyncio.to_thread(self._create)
        with self._errors():
            fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(fd, "wb") as file:
                    async for piece in CheckedContent(source, digest, size).pieces():
                        await asyncio.to_thread(file.write, piece)
                    await asyncio.to_thread(_finish, file)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
            await asyncio.to_thread(sync_directory, path.parent)
        return True

    async def put_manifest(self, reference: Reference, content: bytes, media_type: str) -> Digest:
        """Store a manifest and list it in index.json, in place of what had the same tag."""
        digest = Digest.of(content)
        if reference.digest not in (None, digest):
            raise DigestMismatch(f"manifest {reference}: content has digest {digest}")
        await asyncio.to_thread(self._put_manifest, reference.tag, content, media_type, digest)
        return digest

    def _put_manifest(self, tag: str | None, content: bytes, media_type: str, digest: Digest) -> None:
        self._create()
        with self._errors(), self._locked():
            write_atomic(self._blob_path(digest), content, 0o644)
            path = self._path / "index.json"
            document: dict[str, Any] = {"schemaVersion": 2, "mediaType": labels.MEDIA_OCI_INDEX, "manifests": []}
            if path.exists():
                self._index()  # refuses what cannot be rewritten safely
                document = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
            entry: dict[str, Any] = {"mediaType": media_type, "digest": str(digest), "size": len(content)}
            if tag is not None:
                entry["annotations"] = {REF_NAME: tag}
            kept = [old for old in document.get("manifests", []) if not _replaced(old, tag, digest)]
            write_atomic(path, msgspec.json.encode({**document, "manifests": [*kept, entry]}), 0o644)

    def _index(self) -> _IndexFile:
        """The directory's index.json. Raises NotFound, MalformedImage, LimitExceeded."""
        path = self._path / "index.json"
        try:
            fd = os.open(path, _FOLLOW_NOTHING)
        except OSError as error:
            raise NotFound(f"{self._path}: is not an OCI layout ({error.strerror}: index.json)") from error
        with os.fdopen(fd, "rb") as file:
            self._check_regular(file, "index.json")
            raw = file.read(self._limits.manifest_bytes + 1)
        if len(raw) > self._limits.manifest_bytes:
            raise LimitExceeded(f"{path}: larger than limits.manifest_bytes = {self._limits.manifest_bytes}")
        try:
            index = msgspec.json.decode(raw, type=_IndexFile)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise MalformedImage(f"{path}: {str(error)[:200]}") from error
        if len(index.manifests) > self._limits.index_entries:
            raise LimitExceeded(f"{path}: {len(index.manifests)} is more than limits.index_entries")
        return index

    @contextmanager
    def _blob(self, digest: Digest, size: int | None = None) -> Iterator[tuple[BinaryIO, int]]:
        """An open blob and its size, which must be `size`. No component below the layout may be a link."""
        fds: list[int] = []
        try:
            try:
                fds.append(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                for name in ("blobs", "sha256"):
                    fds.append(os.open(name, _FOLLOW_NOTHING | os.O_DIRECTORY, dir_fd=fds[-1]))
                file = os.fdopen(os.open(digest.hex, _FOLLOW_NOTHING, dir_fd=fds[-1]), "rb")
            except FileNotFoundError:
                raise NotFound(f"blob {digest}: not in {self._path}") from None
            except OSError as error:
                raise MalformedImage(f"blob {digest} in {self._path}: {error.strerror}") from error
            with file:
                found = self._check_regular(file, f"blob {digest}")
                if size is not None and found != size:
                    raise DigestMismatch(f"blob {digest} in {self._path}: expected size {size}, got {found}")
                yield file, found
        finally:
            for fd in fds:
                os.close(fd)

    def _check_regular(self, file: BinaryIO, what: str) -> int:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise MalformedImage(f"{what} in {self._path}: not a regular file")
        return status.st_size

    def _blob_path(self, digest: Digest) -> Path:
        return self._path / "blobs" / "sha256" / digest.hex

    def _create(self) -> None:
        with self._errors():
            (self._path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
            if not (self._path / "oci-layout").exists():
                write_atomic(self._path / "oci-layout", _VERSION, 0o644)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Others who add an image to the same layout wait."""
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SnapshotterError(f"cannot write layout {self._path}: {error.strerror}") from error


def _replaced(old: Any, tag: str | None, digest: Digest) -> bool:
    """An entry gives way to a new one of the same tag, or to one that says nothing new."""
    annotations = (old.get("annotations") or {}) if isinstance(old, dict) else {}
    if tag is not None and annotations.get(REF_NAME) == tag:
        return True
    return old.get("digest") == digest and REF_NAME not in annotations


def _finish(file: BinaryIO) -> None:
    os.fchmod(file.fileno(), 0o644)
    file.flush()
    os.fsync(file.fileno())
