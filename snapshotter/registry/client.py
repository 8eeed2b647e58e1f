"""The OCI distribution API for one image at a time: manifests, blobs, ranges of blobs, uploads.

A registry is never believed: documents are checked against their digest where one is asked for, ranges against the
blob's size, and everything is bounded in bytes, tries and time. Stalls and cut connections are resumed from the last
byte that arrived. Source: distribution-spec v1.1.
"""

import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Hashable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Self

from snapshotter import __version__, labels
from snapshotter.config import Limits, Registry
from snapshotter.credentials import configured
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.digest import Digest
from snapshotter.errors import (
    ConfigError,
    DigestMismatch,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    RegistryUnavailable,
    SnapshotterError,
)
from snapshotter.monitor.tally import Count
from snapshotter.registry import ranges
from snapshotter.registry.auth import Authenticator
from snapshotter.registry.endpoint import Endpoint, Scope
from snapshotter.registry.failover import Health, Tour
from snapshotter.registry.hosts import Hosts
from snapshotter.registry.ranges import Span
from snapshotter.registry.reference import Reference
from snapshotter.registry.retry import TRANSIENT_STATUS, Attempts, Clock, SystemClock, Transient
from snapshotter.registry.session import Session
from snapshotter.registry.tls import TlsContexts
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
_SLOWEST_BYTES_PER_SECOND = 64 << 10  # whole blobs get this much more time than total_timeout_seconds
_NO_RANGES_SECONDS = 60.0  # how long a registry that ignored Range is not asked for far ranges again
_HURRIED_DISCARD_BYTES = 1 << 20  # of a host that ignores Range, while others can be asked
_MAX_HOSTS = 256
_PROBE_SECONDS = 10.0


class RegistryClient:
    """An `ImageSource` and `ImageTarget`. Use as an async context manager; one for the life of a process."""

    def __init__(
        self,
        config: Registry,
        limits: Limits,
        user_agent: str = f"coco-snapshotter/{__version__}",
        clock: Clock | None = None,
        remembered: RememberedLogins | None = None,
    ) -> None:
        """`remembered`: logins that came with pulls. Raises ConfigError for files that cannot be used."""
        self._config = config
        self._limits = limits
        self._clock = clock or SystemClock()
        tls = TlsContexts(config.ca_file)
        self._hosts = Hosts(config.hosts_dir, config.plain_http, tls)
        self._wire = Wire(config, tls, user_agent, self._clock)
        logins = configured.logins(config, limits, remembered)
        self._authenticator = Authenticator(self._wire, logins, limits, self._clock)
        self._session = Session(self._wire, self._authenticator, self._clock)
        self._health = Health(self._clock, self._probe)
        self._without_ranges: OrderedDict[Endpoint, float] = OrderedDict()
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._exit.enter_async_context(self._wire)
        self._exit.push_async_callback(self._authenticator.close)
        self._exit.push_async_callback(self._health.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exit.aclose()

    def host_failures(self) -> list[Count]:
        """How often a host did not serve what it was asked for, by host and reason."""
        return self._health.failures.snapshot()

    async def manifest(self, reference: Reference) -> tuple[bytes, str, Digest]:
        """The document a reference names, its Content-Type, and the digest computed from it.

        Raises DigestMismatch when the reference pins another digest or the registry states another one.
        """
        attempts = self._attempts()
        hosts = [host for host in self._pulling(reference) if reference.digest or host.resolves]
        tour = self._tour(hosts, reference, reference.target, attempts)
        return await tour.run(lambda: self._manifest(reference, tour, attempts.deadline))

    async def _manifest(self, reference: Reference, tour: Tour, deadline: float) -> tuple[bytes, str, Digest]:
        what = f"manifest {reference}"
        limit = self._limits.manifest_bytes
        too_large = LimitExceeded(f"{what}: larger than limits.manifest_bytes = {limit}")
        async with self._session.send(
            tour.host,
            "GET",
            tour.host.at(f"{reference.repository}/manifests/{reference.target}"),
            what=what,
            scope=pull_scope(reference),
            headers={"Accept": _ACCEPT},
            deadline=deadline,
            expect=(200,),
            hurries=tour.hurries,
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
        left = len(self._pulling(reference))
        while True:
            try:
                async with aclosing(self.blob_stream(reference, digest, size)) as pieces:
                    return b"".join([piece async for piece in pieces])
            except DigestMismatch:
                left -= 1
                if not left:
                    raise

    async def blob_stream(self, reference: Reference, digest: Digest, size: int) -> AsyncGenerator[bytes, None]:
        """A whole blob in pieces. They are worth nothing before the end: DigestMismatch comes last."""
        span = self._span(digest, 0, size, size)
        hasher = hashlib.sha256()
        hosts, attempts, served = self._pulling(reference), self._attempts(size), set[Endpoint]()
        tour = self._tour(hosts, reference, digest, attempts)
        async with aclosing(self._pieces(reference, digest, span, tour, attempts, size, served)) as pieces:
            async for piece in pieces:
                hasher.update(piece)
                yield piece
        if hasher.hexdigest() != digest.hex:
            for host in served if len(hosts) > 1 else ():
                self.distrust(reference, digest, host)
            raise DigestMismatch(f"blob of {reference}: expected {digest}, got sha256:{hasher.hexdigest()}")

    async def read_range(self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int) -> bytes:
        """Exactly `length` bytes of a blob from `offset`; what they are is for the caller to verify.

        A registry that ignores Range is put up with as long as few bytes lie before `offset`
        (`ranges.MAX_DISCARD_BYTES`); else RegistryUnavailable, reason no-ranges.
        """
        async with aclosing(self.stream_range(reference, digest, offset, length, blob_size)) as pieces:
            return b"".join([piece async for piece in pieces])

    async def stream_range(
        self,
        reference: Reference,
        digest: Digest,
        offset: int,
        length: int,
        blob_size: int,
        host: Endpoint | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Like `read_range`, in pieces as they come; raises the same errors, possibly after some pieces.

        `host`: only this one of `hosts` is asked, and not for long if there are others.
        """
        span = self._span(digest, offset, offset + length, blob_size)
        hosts = self._pulling(reference)
        attempts, hurries = self._attempts(), False
        if host is not None and len(hosts) > 1:
            attempts, hosts, hurries = self._attempts(retries=0), [host], True
        tour = self._tour(hosts, reference, digest, attempts, hurries=hurries)
        pieces = self._pieces(reference, digest, span, tour, attempts, ranges.MAX_DISCARD_BYTES, set())
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    def hosts(self, reference: Reference, digest: Digest) -> Sequence[Endpoint]:
        """Who can be asked for a blob, in the order in which they should be."""
        return self._health.order(self._pulling(reference), _key(reference, digest))

    def distrust(self, reference: Reference, digest: Digest, host: Endpoint) -> None:
        """What came from `host` for this blob is wrong: others are asked first now."""
        self._health.distrust(host, _key(reference, digest))

    async def _pieces(
        self,
        reference: Reference,
        digest: Digest,
        span: Span,
        tour: Tour,
        attempts: Attempts,
        max_discard_bytes: int,
        served: set[Endpoint],
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of `span`, over as many requests and hosts as it takes; these are put into `served`."""
        what = _blob_name(reference, digest)
        while span.start < span.stop:
            host = tour.host
            try:
                if span.start > max_discard_bytes and self._clock.monotonic() < self._without_ranges.get(host, 0.0):
                    raise ranges.no_ranges(what)
                async with self._session.send(
                    host,
                    "GET",
                    host.at(f"{reference.repository}/blobs/{digest}"),
                    what=what,
                    scope=pull_scope(reference),
                    headers={} if span.is_whole else {"Range": span.header()},
                    deadline=attempts.deadline,
                    expect=(200, 206, 416),
                    remember=(host, reference.repository, digest),
                    hurries=tour.hurries,
                ) as answer:
                    if answer.status == 200 and not span.is_whole:
                        self._note_without_ranges(host)
                    discard = min(max_discard_bytes, _HURRIED_DISCARD_BYTES) if tour.hurries else max_discard_bytes
                    skip = ranges.check_answer(what, answer.status, answer.headers, span, discard)
                    served.add(host)
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
            except SnapshotterError as error:
                await tour.failed(error)

    async def _blob_exists(self, hosts: Sequence[Endpoint], reference: Reference, digest: Digest, scope: Scope) -> bool:
        attempts = self._attempts()
        tour = self._tour(hosts, reference, digest, attempts)
        try:
            await tour.run(lambda: self._head_blob(reference, digest, scope, tour, attempts.deadline))
        except NotFound:
            return False
        return True

    async def _head_blob(self, reference: Reference, digest: Digest, scope: Scope, tour: Tour, deadline: float) -> None:
        async with self._session.send(
            tour.host,
            "HEAD",
            tour.host.at(f"{reference.repository}/blobs/{digest}"),
            what=_blob_name(reference, digest),
            scope=scope,
            deadline=deadline,
            expect=(200,),
            hurries=tour.hurries,
        ):
            pass

    async def upload_blob(self, reference: Reference, digest: Digest, size: int, source: BlobContent) -> bool:
        """Store a blob; False if the repository has it. Raises DigestMismatch if `source` is not what it should be."""
        # Asked with the right to push: a repository that does not exist yet may not even be read. And not a mirror.
        scope, hosts = push_scope(reference), self._pushing(reference)
        if await self._blob_exists(hosts, reference, digest, scope):
            return False
        attempts = self._attempts(size)
        tour = self._tour(hosts, reference, digest, attempts)

        async def upload() -> None:
            upload = Upload(self._session, tour.host, scope, self._config, digest, size, source)
            start = tour.host.at(f"{reference.repository}/blobs/uploads/")
            await upload.run(f"upload of {_blob_name(reference, digest)}", start, attempts)

        await tour.run(upload)
        return True

    async def put_manifest(self, reference: Reference, content: bytes, media_type: str) -> Digest:
        """Store a manifest under the reference's digest or tag. Raises DigestMismatch."""
        digest = Digest.of(content)
        if reference.digest not in (None, digest):
            raise DigestMismatch(f"manifest {reference}: content has digest {digest}")
        attempts = self._attempts()
        tour = self._tour(self._pushing(reference), reference, reference.target, attempts)
        await tour.run(lambda: self._put_manifest(reference, content, media_type, digest, tour.host, attempts.deadline))
        return digest

    async def _put_manifest(
        self, reference: Reference, content: bytes, media_type: str, digest: Digest, host: Endpoint, deadline: float
    ) -> None:
        what = f"manifest {reference}"
        async with self._session.send(
            host,
            "PUT",
            host.at(f"{reference.repository}/manifests/{reference.target}"),
            what=what,
            scope=push_scope(reference),
            headers={"Content-Type": media_type},
            body=lambda: content,
            deadline=deadline,
            expect=(200, 201, 202),
        ) as answer:
            stored = ranges.stated_digest(what, answer.headers)
        if stored not in (None, digest):
            raise DigestMismatch(f"{what}: sent {digest}, registry stored {stored}")

    def _attempts(self, size: int = 0, retries: int | None = None) -> Attempts:
        seconds = self._config.total_timeout_seconds + size / _SLOWEST_BYTES_PER_SECOND
        retries = self._config.retries if retries is None else retries
        return Attempts(self._clock, retries, self._clock.monotonic() + seconds)

    def _tour(
        self,
        hosts: Sequence[Endpoint],
        reference: Reference,
        target: str,
        attempts: Attempts,
        *,
        hurries: bool = False,
    ) -> Tour:
        if not hosts:
            raise ConfigError(f"hosts_dir: no host of {reference.host} may be asked for this")
        return Tour(hosts, _key(reference, target), self._health, attempts, hurries=hurries)

    def _pulling(self, reference: Reference) -> list[Endpoint]:
        return [host for host in self._hosts.of(reference) if host.pulls]

    def _pushing(self, reference: Reference) -> list[Endpoint]:
        """One host, twice if it is not known whether it speaks TLS."""
        hosts = [host for host in self._hosts.of(reference) if host.pushes]
        return [host for host in hosts if host.host == hosts[0].host]

    async def _probe(self, host: Endpoint) -> None:
        """Raises RegistryUnavailable unless it answers."""
        deadline = self._clock.monotonic() + _PROBE_SECONDS
        async with self._wire.exchange(
            "GET", host.at(""), headers=host.own_headers, via=host, deadline=deadline
        ) as answer:
            await answer.discard()
        if answer.status in TRANSIENT_STATUS:
            raise RegistryUnavailable(f"{host.url.origin()}: answers {answer.status}")

    @property
    def met_no_ranges(self) -> bool:
        """Whether some host has lately answered a request for a part of a blob with all of it."""
        return bool(self._without_ranges)

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


def pull_scope(reference: Reference) -> Scope:
    """Scope of a token that reads."""
    return Scope(reference.repository, "pull")


def push_scope(reference: Reference) -> Scope:
    return Scope(reference.repository, "pull,push")


def _blob_name(reference: Reference, digest: Digest) -> str:
    return f"blob {digest} of {reference.host}/{reference.repository}"


def _key(reference: Reference, target: str) -> Hashable:
    """What hosts may have or not have."""
    return reference.host, reference.repository, target
