"""The pull path put together. Importing this module is most of what snapshotd does when it starts."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from snapshotter.bootstrap.loader import Loader
from snapshotter.config import Config
from snapshotter.image.documents import DocumentCache
from snapshotter.image.policy import ImagePolicy
from snapshotter.image.resolver import Resolver
from snapshotter.keys import configured
from snapshotter.monitor.trail import Trail
from snapshotter.registry.client import RegistryClient
from snapshotter.snapshots.images import Attachments, Images, Mounter
from snapshotter.snapshots.watched import WatchedKeys, WatchedSource


@contextlib.asynccontextmanager
async def open_images(
    settings: Config, policy: ImagePolicy, attachments: Attachments, mounter: Mounter, trail: Trail
) -> AsyncIterator[Images]:
    """The images of this node, with connections to registries and key brokers. Raises ConfigError."""
    provider = configured.provider(settings.keys, lambda name, keys: WatchedKeys(name, keys, trail))
    async with RegistryClient(settings.registry, settings.limits) as registry:
        cache, limits = Path(settings.cache_dir), settings.limits
        source = WatchedSource(registry, trail)
        documents = DocumentCache(source, cache / "documents", limits)
        loader = Loader(source, provider, cache, limits, must_be_sealed=policy.must_be_sealed)
        resolver = Resolver(documents, policy, limits)
        yield Images(documents, resolver, loader, policy, attachments, mounter, trail)
