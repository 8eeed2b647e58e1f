"""One image, from its registry to its key: what a pull on this node would meet. Nothing is kept."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from snapshotter.cli.doctor.check import Check, Checks, Node, Result, Skipped, fail, ok, warn
from snapshotter.cli.image import this_platform
from snapshotter.cli.opened import resolve
from snapshotter.errors import (
    KeyDenied,
    NotFound,
    PolicyDenied,
    RegistryDenied,
    SnapshotterError,
    Unavailable,
)
from snapshotter.image.claim import LayerClaim
from snapshotter.image.documents import DocumentCache
from snapshotter.image.manifest import ResolvedImage
from snapshotter.image.policy import ImagePolicy
from snapshotter.image.resolver import EncryptedImage, Image, LazyImage, Resolver
from snapshotter.keys import configured
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.reference import Reference
from snapshotter.snapshots.pullpath import origin


class _Look(NamedTuple):
    client: RegistryClient
    reference: Reference
    resolved: ResolvedImage
    image: Image


@contextlib.asynccontextmanager
async def _looking(node: Node) -> AsyncIterator[_Look]:
    """Raises what resolving the image raises."""
    if not node.image:
        raise Skipped("--image REF says which image")
    reference = Reference.parse(node.image.removeprefix("docker://"))
    async with RegistryClient(node.config.registry, node.config.limits) as client:
        resolved, image = await resolve(client, reference, this_platform(), node.config)
        yield _Look(client, reference, resolved, image)


async def manifest(node: Node) -> Result:
    """The registry answers, its credentials are right, the image is well-formed."""
    try:
        async with _looking(node) as look:
            return ok(f"{look.resolved.manifest_digest}, {len(look.resolved.manifest.layers)} layers")
    except RegistryDenied as error:
        return fail(str(error), '[registry] docker_config = "/root/.docker/config.json", with credentials for it')
    except NotFound as error:
        return fail(str(error), "the name, the tag, and the platform")
    except Unavailable as error:
        advice = "the registry, DNS, proxy and firewall; [registry] plain_http or ca_file if it is a private one"
        return fail(str(error), advice)
    except SnapshotterError as error:
        return fail(str(error), "push the image again from its source")


@contextlib.asynccontextmanager
async def _resolved(node: Node) -> AsyncIterator[_Look]:
    """For checks that need an image to look at."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            look = await stack.enter_async_context(_looking(node))
        except SnapshotterError:
            raise Skipped("image-manifest says why") from None
        yield look


async def kind(node: Node) -> Result:
    async with _resolved(node) as look:
        if isinstance(look.image, LazyImage):
            return ok("sealed" if look.image.encrypted else "plain, read on demand")
        if isinstance(look.image, EncryptedImage):
            return warn(
                "encrypted as a whole: a pull downloads and unpacks all of it", "coco-snapshotter convert its source"
            )
        if node.config.mode == "confidential":
            return fail(
                "an ordinary image, which mode confidential refuses", "coco-snapshotter convert … --recipient …"
            )
        return warn("an ordinary image: containerd downloads all of it", "coco-snapshotter convert makes it lazy")


async def policy(node: Node) -> Result:
    """Whether it may run here under the name it was given, decided as at a pull: pins, rules, signatures."""
    async with _resolved(node) as look:
        config, digest = node.config, look.resolved.manifest_digest
        try:
            documents = DocumentCache(look.client, Path(config.cache_dir) / "documents", config.limits)
            rules = ImagePolicy.of(config.mode, config.policy)
            resolver = Resolver(documents, origin(config, rules, documents), config.limits)
            layer = look.resolved.manifest.layers[-1].digest
            image = await resolver.resolve(LayerClaim(str(look.reference), digest, layer, "", None))
            return ok(f"admitted: {image.admission.rule}")
        except PolicyDenied as error:
            name = f"{look.reference.host}/{look.reference.repository}@{digest}"
            return fail(str(error), f'pull {name}, or [policy] pins = ["{name}"]')
        except SnapshotterError as error:
            return fail(str(error), "[policy] and what it names: files, keys, places of signatures")


async def ranges(node: Node) -> Result:
    """Reading on demand asks for parts of blobs (206), which some registries and proxies do not serve."""
    async with _resolved(node) as look:
        layer = max(look.resolved.manifest.layers, key=lambda layer: layer.size)
        place = max(layer.size - 2, 0)
        try:
            source = look.reference.pinned(look.resolved.manifest_digest)
            await look.client.read_range(source, layer.digest, place, min(1, layer.size), layer.size)
        except SnapshotterError as error:
            return fail(str(error), "a registry, mirror or proxy that serves Range requests")
        if look.client.met_no_ranges:
            return fail(
                f"{look.reference.host} answers a Range request with the whole blob: every read downloads a layer",
                "a registry, mirror or proxy that serves Range requests",
            )
        return ok("the registry serves parts of blobs")


async def key(node: Node) -> Result:
    """Whether some key of ours, or a broker, opens the image."""
    async with _resolved(node) as look:
        if not isinstance(look.image, LazyImage) or not look.image.encrypted:
            raise Skipped("the image is not sealed")
        try:
            provider = configured.provider(node.config.keys)
            with (await provider.unwrap(look.image.bootstrap.annotations, node.config.limits)).symkey:
                return ok("a key of ours opens it")
        except KeyDenied as error:
            return fail(str(error), "wrap it for this node (convert --recipient), or ask the key broker's owner")
        except Unavailable as error:
            return fail(str(error), "the key service: see keys-services")
        except SnapshotterError as error:
            return fail(str(error), "convert the image again")


CHECKS: Checks = (
    Check("image-manifest", manifest),
    Check("image-kind", kind),
    Check("image-policy", policy),
    Check("image-ranges", ranges),
    Check("image-key", key),
)
