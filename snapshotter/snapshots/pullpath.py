"""The pull path put together. Importing this module is most of what snapshotd does when it starts."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from snapshotter.bootstrap.loader import Loader
from snapshotter.config import Config
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.image.documents import DocumentCache
from snapshotter.image.origin import Origin, stated
from snapshotter.image.policy import ImagePolicy
from snapshotter.image.resolver import Resolver
from snapshotter.image.sigstore import CosignSignatures, KeptSignatures
from snapshotter.keys import configured
from snapshotter.keys.audit import AuditedKeys, AuditLog
from snapshotter.keys.provider import KeyProvider
from snapshotter.monitor.trail import Trail
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.transport import ImageSource
from snapshotter.snapshots.images import Attachments, Images, Mounter
from snapshotter.snapshots.watched import WatchedKeys, WatchedSource
from snapshotter.snapshots.wholelayers import WholeLayers


@contextlib.asynccontextmanager
async def open_images(
    settings: Config, attachments: Attachments, mounter: Mounter, trail: Trail, remembered: RememberedLogins
) -> AsyncIterator[Images]:
    """The images of this node, with connections to registries and key brokers. Raises ConfigError.

    `remembered`: logins that come with pulls.
    """
    policy = ImagePolicy.of(settings.mode, settings.policy)
    cache, limits = Path(settings.cache_dir), settings.limits
    with contextlib.closing(AuditLog(Path(settings.root))) as audit:

        def watch(name: str, keys: KeyProvider) -> KeyProvider:
            return AuditedKeys(name, WatchedKeys(name, keys, trail), audit, trail.subject)

        provider = configured.provider(settings.keys, watch)
        async with RegistryClient(settings.registry, limits, remembered=remembered) as registry:
            source = WatchedSource(registry, trail)
            documents = DocumentCache(source, cache / "documents", limits)
            loader = Loader(source, provider, cache, limits, policy)
            resolver = Resolver(documents, origin(settings, policy, documents), limits)
            keys = configured.any_configured(settings.keys)
            layers = WholeLayers(source, provider, limits) if keys else None
            yield Images(documents, resolver, loader, policy, attachments, mounter, trail, layers)


def origin(settings: Config, policy: ImagePolicy, documents: ImageSource) -> Origin:
    """Who judges images: `policy`, and signatures where a trust policy is configured. Raises ConfigError."""
    limits, trust = settings.limits, stated(settings)
    if trust is None:
        return Origin(policy, limits)
    source, lookaside = trust
    kept = KeptSignatures(Path(settings.cache_dir) / "documents")
    return Origin(policy, limits, source, [CosignSignatures(documents, limits), *lookaside], kept)
