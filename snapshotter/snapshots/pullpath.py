"""The pull path put together. Importing this module is most of what snapshotd does when it starts."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from snapshotter.bootstrap.loader import Loader
from snapshotter.config import Config
from snapshotter.image.policy import ImagePolicy
from snapshotter.image.resolver import Resolver
from snapshotter.keys import configured
from snapshotter.registry.client import RegistryClient
from snapshotter.snapshots.images import Attachments, Images, Mounter


@contextlib.asynccontextmanager
async def open_images(
    settings: Config, policy: ImagePolicy, attachments: Attachments, mounter: Mounter
) -> AsyncIterator[Images]:
    """The images of this node, with connections to registries and key brokers. Raises ConfigError."""
    provider = configured.provider(settings.keys)
    async with RegistryClient(settings.registry, settings.limits) as registry:
        loader = Loader(
            registry, provider, Path(settings.cache_dir), settings.limits, must_be_sealed=policy.must_be_sealed
        )
        yield Images(Resolver(registry, policy, settings.limits), loader, policy, attachments, mounter)
