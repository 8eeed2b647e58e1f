"""The OCI distribution API for one image at a time: manifests, blobs, ranges of blobs, uploads.

A registry is never believed: documents are checked against their digest where one is asked for, ranges against the
blob's size, and everything is bounded in bytes, tries and time. Stalls and cut connections are resumed from the last
byte that arrived. Source: distribution-spec v1.1.
"""

import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Self

from yarl import URL

from snapshotter import __version__, labels
from snapshotter.config import Limits, Registry
from snapshotter.digest import Digest
from snapshotter.errors import BadReference, DigestMismatch, InvalidArgument, LimitExceeded, NotFound
from snapshotter.registry import ranges
from snapshotter.registry.auth import Authenticator, DockerConfig, Endpoint
from snapshotter.registry.ranges import Span
from snapshotter.registry.reference import DOCKER_HUB, Reference
from snapshotter.registry.retry import Attempts, Clock, SystemClock, Transient
from snapshotter.registry.session import Session
from snapshotter.registry.upload import BlobContent, Upload
from snapshotter.registry.wire import Wire

_ACCEPT = ", ".join(
    (
        labels.MEDIA_OCI_MANIFEST,
        labels.MEDIA_OCI_INDEX,
        labels.MEDIA_DOCKER_MANIFEST,
        labels.MEDIA_DOCKER_INDEX,
    )
)
_HUB_ORIGIN = "registry-1.docker.io"
_SLOWEST_BYTES_PER_SECOND = 64 << 10  # whole blobs get this much more time than total_timeout_seconds
_NO_RANGES_SECONDS = 60.0  # how long a registry that ignored Range is not asked for far ranges again
_MAX_HOSTS = 256


class RegistryClient:
    """An `ImageSource` and `ImageTarget`. Use as an async context manager; one for the life of a process."""

    def __init__(
        self,
        config: Registry,
        limits: Limits,
        user_agent: str = f"coco-snapshotter/{__version__}",
        clock: Clock | None = None,
    ) -> None:
        """Raises ConfigError for a CA file that cannot be used."""
        self._config = config
        self._limits = limits
        self._clock = clock or SystemClock()
        self._wire = Wire(config, user_agent, self._clock)
        authenticator = Authenticator(self._wire, DockerConfig(config.docker_config), limits, self._clock)
        self._session = Session(self._wire, authenticator, self._clock)
        self._without_ranges: OrderedDict[Endpoint, float] = OrderedDict()
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._exit.enter_async_context(self._wire)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exit.aclose()

    async def manifest(self, reference: Reference) -> tuple[bytes, str, Digest]:
        """The document a reference names, its Content-Type, and the digest computed from it.

        Raises DigestMismatch when the reference pins another digest or the registry states another one.
        """
        attempts = self._attempts()
        return await attempts.run(lambda: self._manifest(reference, attempts))

    async def _manifest(self, reference: Reference, attempts: Attempts) -> tuple[bytes, str, Digest]:
        what = f"manifest {reference}"
        limit = self._limits.manifest_bytes
        too_large = LimitExceeded(f"{what}: larger than limits.manifest_bytes = {limit}")
        endpoint = self._endpoint(reference)
        async with self._session.send(
            endpoint,
            "GET",
            _url(endpoint, reference, f"manifests/{reference.target}"),
            what=what,
            scope=pull_scope(reference),
            headers={"Accept": _ACCEPT},
            deadline=attempts.deadline,
            expect=(200,),
        ) as answer:
            ranges.check_unencoded(what, answer.headers)
            if (ranges.parse_content_length(answer.headers) or 0) > limit:
                raise too_large
            raw = await answer.read_all(limit)
            if raw is None:
                raise too_large
        digest = Digest.of(raw)
        expected = reference.digest or ranges.stated_digest(what, answer.headers) or digest
        if digest != expected:
            raise DigestMismatch(f"{what}: expected {expected}, got {digest}")
        return raw, answer.headers.get("Content-Type", ""), digest

    async def blob(self, reference: Reference, digest: Digest, size: int, limit: int) -> bytes:
        """A whole blob. Raises LimitExceeded before asking if `size` is over `limit`, DigestMismatch."""
        if size > limit:
            raise LimitExceeded(f"blob {digest}: {size} bytes are more than the allowed {limit}")
        async with aclosing(self.blob_stream(reference, digest, size)) as pieces:
            return b"".join([piece async for piece in pieces])

    async def blob_stream(self, reference: Reference, digest: Digest, size: int) -> AsyncGenerator[bytes, None]:
        """A whole blob in pieces. They are worth nothing before the end: DigestMismatch comes last."""
        span = self._span(digest, 0, size, size)
        hasher = hashlib.sha256()
        async with aclosing(self._pieces(reference, digest, span, self._attempts(size), size)) as pieces:
            async for piece in pieces:
                hasher.update(piece)
                yield piece
        if hasher.hexdigest() != digest.hex:
            raise DigestMismatch(f"blob of {reference}: expected {digest}, got sha256:{hasher.hexdigest()}")

    async def read_range(self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int) -> bytes:
        """Exactly `length` bytes of a blob from `offset`; what they are is for the caller to verify.

        A registry that ignores Range is put up with as long as few bytes lie before `offset`
        (`ranges.MAX_DISCARD_BYTES`); else RegistryUnavailable, reason no-ranges.
        """
        span = self._span(digest, offset, offset + length, blob_size)
        endpoint = self._endpoint(reference)
        far = offset > ranges.MAX_DISCARD_BYTES
        if far and self._clock.monotonic() < self._without_ranges.get(endpoint, 0.0):
            raise ranges.no_ranges(_blob_name(reference, digest))
        source = self._pieces(reference, digest, span, self._attempts(), ranges.MAX_DISCARD_BYTES)
        async with aclosing(source) as pieces:
            return b"".join([piece async for piece in pieces])

    async def _pieces(
        self, reference: Reference, digest: Digest, span: Span, attempts: Attempts, max_discard_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of `span`, over as many requests as it takes."""
        what = _blob_name(reference, digest)
        endpoint = self._endpoint(reference)
        while span.start < span.stop:
            try:
                async with self._session.send(
                    endpoint,
                    "GET",
                    _url(endpoint, reference, f"blobs/{digest}"),
                    what=what,
                    scope=pull_scope(reference),
                    headers={} if span.is_whole else {"Range": span.header()},
                    deadline=attempts.deadline,
                    expect=(200, 206, 416),
                    remember=(endpoint, reference.repository, digest),
                ) as answer:
                    if answer.status == 200 and not span.is_whole:
                        self._note_without_ranges(endpoint)
                    skip = ranges.check_answer(what, answer.status, answer.headers, span, max_discard_bytes)
                    while span.start < span.stop:
                        piece = await answer.read()
                        if not piece:
                            raise Transient(f"{what}: body ends early")
                        skipped = min(skip, len(piece))
                        skip -= skipped
                        piece = piece[skipped : skipped + span.stop - span.start]
                        if piece:
                            span = span._replace(start=span.start + len(piece))
                            attempts.progressed()
                            yield piece
            except Transient as error:
                await attempts.pause(error)

    async def blob_exists(self, reference: Reference, digest: Digest) -> bool:
        """Whether the repository has the blob."""
        return await self._blob_exists(reference, digest, pull_scope(reference))

    async def _blob_exists(self, reference: Reference, digest: Digest, scope: str) -> bool:
        attempts = self._attempts()
        return await attempts.run(lambda: self._head_blob(reference, digest, scope, attempts))

    async def _head_blob(self, reference: Reference, digest: Digest, scope: str, attempts: Attempts) -> bool:
        endpoint = self._endpoint(reference)
        try:
            async with self._session.send(
                endpoint,
                "HEAD",
                _url(endpoint, reference, f"blobs/{digest}"),
                what=_blob_name(reference, digest),
                scope=scope,
                deadline=attempts.deadline,
                expect=(200,),
            ):
                return True
        except NotFound:
            return False

    async def upload_blob(self, reference: Reference, digest: Digest, size: int, source: BlobContent) -> None:
        """Store a blob unless the repository has it. Raises DigestMismatch if `source` is not what it should be."""
        # Asked with the right to push: a repository that does not exist yet may not even be read.
        if await self._blob_exists(reference, digest, push_scope(reference)):
            return
        endpoint = self._endpoint(reference)
        upload = Upload(self._session, endpoint, push_scope(reference), self._config, digest, size, source)
        attempts = self._attempts(size)
        start = _url(endpoint, reference, "blobs/uploads/")
        await attempts.run(lambda: upload.run(f"upload of {_blob_name(reference, digest)}", start, attempts))

    async def put_manifest(self, reference: Reference, content: bytes, media_type: str) -> Digest:
        """Store a manifest under the reference's digest or tag. Raises DigestMismatch."""
        digest = Digest.of(content)
        if reference.digest not in (None, digest):
            raise DigestMismatch(f"manifest {reference}: content has digest {digest}")
        attempts = self._attempts()
        await attempts.run(lambda: self._put_manifest(reference, content, media_type, digest, attempts))
        return digest

    async def _put_manifest(
        self, reference: Reference, content: bytes, media_type: str, digest: Digest, attempts: Attempts
    ) -> None:
        endpoint = self._endpoint(reference)
        what = f"manifest {reference}"
        async with self._session.send(
            endpoint,
            "PUT",
            _url(endpoint, reference, f"manifests/{reference.target}"),
            what=what,
            scope=push_scope(reference),
            headers={"Content-Type": media_type},
            body=lambda: content,
            deadline=attempts.deadline,
            expect=(200, 201, 202),
        ) as answer:
            stored = ranges.stated_digest(what, answer.headers)
        if stored not in (None, digest):
            raise DigestMismatch(f"{what}: sent {digest}, registry stored {stored}")

    def _attempts(self, size: int = 0) -> Attempts:
        seconds = self._config.total_timeout_seconds + size / _SLOWEST_BYTES_PER_SECOND
        return Attempts(self._clock, self._config.retries, self._clock.monotonic() + seconds)

    def _endpoint(self, reference: Reference) -> Endpoint:
        host = reference.host
        plain = reference.is_loopback or host in self._config.plain_http
        try:
            url = URL(f"{'http' if plain else 'https'}://{_HUB_ORIGIN if host == DOCKER_HUB else host}")
        except ValueError:
            url = URL()
        if not url.host:
            raise BadReference(f"image {reference}: not in a registry")
        return Endpoint(host, url)

    def _span(self, digest: Digest, start: int, stop: int, size: int) -> Span:
        if size > self._limits.blob_bytes:
            raise LimitExceeded(f"blob {digest}: {size} bytes are more than limits.blob_bytes")
        if not 0 <= start <= stop <= size:
            raise InvalidArgument(f"blob {digest}: no bytes {start}-{stop} in {size}")
        return Span(start, stop, size)

    def _note_without_ranges(self, endpoint: Endpoint) -> None:
        self._without_ranges[endpoint] = self._clock.monotonic() + _NO_RANGES_SECONDS
        while len(self._without_ranges) > _MAX_HOSTS:
            self._without_ranges.popitem(last=False)


def pull_scope(reference: Reference) -> str:
    """Scope of a token that reads (distribution docs/spec/auth/scope.md)."""
    return f"repository:{reference.repository}:pull"


def push_scope(reference: Reference) -> str:
    return f"repository:{reference.repository}:pull,push"


def _blob_name(reference: Reference, digest: Digest) -> str:
    return f"blob {digest} of {reference.host}/{reference.repository}"


def _url(endpoint: Endpoint, reference: Reference, path: str) -> URL:
    return endpoint.url.with_path(f"/v2/{reference.repository}/{path}", encoded=True)
