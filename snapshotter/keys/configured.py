"""The key provider that a configuration asks for.

What speaks to key brokers is imported only where one is configured: clients wait for a worker that starts.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from snapshotter import config
from snapshotter.errors import ConfigError
from snapshotter.keys.provider import AnyOf, FileKeys, KeyProvider
from snapshotter.keys.resource import Resources

FRESH_SECONDS = 10  # a pull asks for the policy once for each layer


def provider(
    keys: config.Keys, watch: Callable[[str, KeyProvider], KeyProvider] = lambda _name, provider: provider
) -> KeyProvider:
    """Key files first, then the providers of `ocicrypt_config`, then CDH, then the KBS; each goes through `watch`.

    Raises ConfigError naming the file or option that is wrong. Nobody is asked before a layer needs a key.
    """
    providers: list[KeyProvider] = [watch("files", FileKeys(keys.files))]
    if keys.ocicrypt_config:
        from snapshotter.keys.protocol import ProviderKeys

        providers.append(
            watch("ocicrypt", ProviderKeys.load(Path(keys.ocicrypt_config), accept_a256ctr=keys.accept_a256ctr))
        )
    if keys.cdh.address:
        from snapshotter.keys import cdh

        providers.append(watch("cdh", cdh.provider(keys.cdh, accept_a256ctr=keys.accept_a256ctr)))
    if keys.kbs.url:
        from snapshotter.keys import kbs
        from snapshotter.keys.packet import PacketKeys

        providers.append(watch("kbs", PacketKeys(kbs.client(keys.kbs), accept_a256ctr=keys.accept_a256ctr)))
    return providers[0] if len(providers) == 1 else AnyOf(providers)


def resources(keys: config.Keys) -> Resources:
    """Who hands out `kbs:///` resources: CDH, else the KBS. Raises ConfigError, also when neither is configured.

    Not from memory for as long as keys are: what is withdrawn, a policy or a signing key, must soon not count.
    """
    if keys.cdh.address:
        from snapshotter.keys import cdh

        return cdh.resources(keys.cdh)
    if keys.kbs.url:
        from snapshotter.keys import kbs

        return kbs.client(msgspec.structs.replace(keys.kbs, cache_seconds=min(keys.kbs.cache_seconds, FRESH_SECONDS)))
    raise ConfigError("config: a kbs:/// resource needs keys.kbs.url or keys.cdh.address")


def has_broker(keys: config.Keys) -> bool:
    """Whether `resources` has anybody to ask."""
    return bool(keys.cdh.address or keys.kbs.url)


def any_configured(keys: config.Keys) -> bool:
    """Whether there is anybody at all who could open a layer."""
    return bool(keys.files or keys.ocicrypt_config or keys.cdh.address or keys.kbs.url)
