"""Is there a signature that the trust policy asks for? Reads policy, keys and signatures, and has them verified."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import structlog

from snapshotter.config import Config, Limits
from snapshotter.digest import Digest
from snapshotter.errors import ConfigError, MalformedImage, PolicyDenied, SnapshotterError, Unavailable
from snapshotter.files import read_regular
from snapshotter.image import gpg, signature, trustpolicy
from snapshotter.image.policy import Admission, Evidence, ImagePolicy
from snapshotter.image.signature import Claim
from snapshotter.image.sigstore import Found, KeptSignatures, Lookaside, SignatureSource
from snapshotter.image.trustpolicy import Key, Signed, TrustPolicy
from snapshotter.keys import configured
from snapshotter.keys.resource import Resources, ResourceUri
from snapshotter.registry.reference import Reference

log = structlog.get_logger(__name__)


class TrustSource(Protocol):
    """Where policy.json and the keys that it names come from."""

    async def policy(self) -> TrustPolicy: ...

    async def key(self, key: Key) -> bytes: ...


class ConfiguredTrust:
    """`[policy] file`: read anew for each image, so that a changed file counts without a restart."""

    def __init__(self, location: str, resources: Resources | None) -> None:
        """`location`: a path or kbs:///…; `resources` hands out the latter. Raises ConfigError."""
        if location.startswith("kbs:") and resources is None:
            raise ConfigError("config: policy.file: a kbs:/// resource needs keys.kbs.url or keys.cdh.address")
        if location.startswith("kbs:"):
            _resource(location)
        self._location = location
        self._resources = resources

    async def policy(self) -> TrustPolicy:
        """Raises ConfigError, KeyDenied, Unavailable: without its policy no image runs."""
        return TrustPolicy.parse(await self._read(self._location, trustpolicy.MAX_BYTES), self._location)

    async def key(self, key: Key) -> bytes:
        """See TrustSource. Raises as `policy`."""
        return key if isinstance(key, bytes) else await self._read(key, trustpolicy.MAX_BYTES)

    async def _read(self, location: str, limit: int) -> bytes:
        if not location.startswith("kbs:"):
            content = await asyncio.to_thread(read_regular, Path(location), limit)
            if content is None:
                raise ConfigError(f"policy: {location}: cannot be read, or is larger than {limit} bytes")
            return content
        if self._resources is None:
            raise ConfigError(f"policy: {location}: a kbs:/// resource needs keys.kbs.url or keys.cdh.address")
        with await self._resources.get(_resource(location)) as resource:
            return resource.expose()


def _resource(location: str) -> ResourceUri:
    try:
        return ResourceUri.parse(location)
    except MalformedImage as error:
        raise ConfigError(f"policy: {location[:200]}: {error}") from None


def stated(settings: Config) -> tuple[ConfiguredTrust, list[SignatureSource]] | None:
    """`[policy] file`, and where signatures are besides the registry; None without a file. Raises ConfigError."""
    policy = settings.policy
    if not policy.file:
        return None
    lookaside: list[SignatureSource] = [Lookaside(policy.lookaside)] if policy.lookaside else []
    resources = configured.resources(settings.keys) if configured.has_broker(settings.keys) else None
    return ConfiguredTrust(policy.file, resources), lookaside


class Origin:
    """Admits images: signatures first, if a trust policy is configured, then `ImagePolicy`."""

    def __init__(
        self,
        policy: ImagePolicy,
        limits: Limits,
        trust: TrustSource | None = None,
        sources: Sequence[SignatureSource] = (),
        kept: KeptSignatures | None = None,
    ) -> None:
        self.policy = policy
        self.limits = limits
        self._trust = trust
        self._kept = kept
        self._sources = [*([kept] if kept else []), *sources]  # what is at hand first

    def index_counts(self, reference: Reference) -> bool:
        """Whether an image that a tag leads to could be admitted because of the index on the way."""
        return reference.digest is None and (self._trust is not None or self.policy.is_pinned(reference))

    async def admit(self, reference: Reference, digests: Sequence[Digest]) -> Admission:
        """See ImagePolicy.admit. Raises PolicyDenied, ConfigError, and what reading policy and signatures raises."""
        evidence = await self._evidence(reference, digests) if self._trust else None
        return self.policy.admit(reference, digests, evidence)

    async def basis(self, reference: Reference) -> str:
        """Changes when the trust policy says something else of `reference`, or by other keys. Raises as `admit`."""
        if self._trust is None:
            return ""
        rule = (await self._trust.policy()).rule(reference)
        signed = [requirement for requirement in rule.requirements if isinstance(requirement, Signed)]
        keys = [await self._trust.key(key) for requirement in signed for key in requirement.keys]
        return Digest.of(repr((rule, keys)).encode())

    async def keep(self, admission: Admission) -> None:
        """Remember the signatures of an image that passed every step."""
        if admission.evidence is not None and self._kept is not None:
            for digest, found in admission.evidence.signatures:
                await self._kept.keep(digest, found)

    async def _evidence(self, reference: Reference, digests: Sequence[Digest]) -> Evidence | None:
        """What satisfied all signature requirements; None if the rule has none. Raises PolicyDenied."""
        assert self._trust is not None
        rule = (await self._trust.policy()).rule(reference)
        evidence: Evidence | None = None
        for requirement in rule.requirements:
            if requirement == "reject":
                raise PolicyDenied(f"image {reference}: rejected by the trust policy, scope {rule.scope!r}")
            if isinstance(requirement, Signed):
                found = await self._satisfy(reference, digests, requirement, rule.scope)
                others = evidence.signatures if evidence else ()
                evidence = Evidence(found.rule, (*others, *found.signatures))
        return evidence

    async def _satisfy(
        self, reference: Reference, digests: Sequence[Digest], requirement: Signed, scope: str
    ) -> Evidence:
        assert self._trust is not None
        keys = [await self._trust.key(key) for key in requirement.keys]
        refusals: list[str] = []
        later: Unavailable | None = None
        for source in self._sources:
            for digest in reversed(digests):  # the manifest's own first
                try:
                    signatures = await source.find(reference, digest)
                except SnapshotterError as error:  # there may be a good one elsewhere
                    later = later or (error if isinstance(error, Unavailable) else None)
                    refusals.append(str(error))
                    continue
                for found in signatures:
                    refusal = await _refusal(found, reference, digest, requirement, keys)
                    if refusal is None:
                        name = requirement.keys[0] if isinstance(requirement.keys[0], str) else "inline key"
                        rule = f"signed: {requirement.kind}, scope {scope}, key {name}"
                        return Evidence(rule, ((digest, found),))
                    refusals.append(refusal)
        if later is not None:
            raise later
        shown = "; ".join(dict.fromkeys(refusals)) if refusals else "it has no signature"
        raise PolicyDenied(f"image {reference}: trust policy, scope {scope!r}, {requirement.kind}: {shown[:500]}")


async def _refusal(
    found: Found, reference: Reference, digest: Digest, requirement: Signed, keys: Sequence[bytes]
) -> str | None:
    """Why this signature is not good enough; None if it is."""
    if requirement.kind == "signedBy":
        if found.payload:
            return "its signature is no simple signature"
        payload = await gpg.signed_message(found.signature, keys)
        kind = signature.SIMPLE
    else:
        if not found.payload:
            return "its signature is no cosign signature"
        names = [str(key)[:100] if isinstance(key, str) else "inline key" for key in requirement.keys]
        trusted = [signature.load_public_key(pem, name) for pem, name in zip(keys, names, strict=True)]
        signed = any(signature.is_signed_by(found.payload, found.signature, key) for key in trusted)
        payload = found.payload if signed else None
        kind = signature.COSIGN
    if payload is None:
        return "a signature is not by a trusted key"
    try:
        claim = Claim.parse(payload, kind)
    except SnapshotterError as error:
        return str(error)
    if claim.manifest != digest:
        return f"a signature is for another manifest, {claim.manifest}"
    if not requirement.identity.accepts(reference, claim.docker_reference):
        return f"a signature is for {claim.docker_reference[:200]!r}, which {requirement.identity.kind} does not accept"
    return None
