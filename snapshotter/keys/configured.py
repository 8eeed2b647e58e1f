"""The key provider that a configuration asks for."""

from pathlib import Path

from snapshotter import config
from snapshotter.keys import cdh, kbs
from snapshotter.keys.packet import PacketKeys
from snapshotter.keys.protocol import ProviderKeys
from snapshotter.keys.provider import AnyOf, FileKeys, KeyProvider


def provider(keys: config.Keys) -> KeyProvider:
    """Key files first, then the providers of `ocicrypt_config`, then CDH, then the KBS.

    Raises ConfigError naming the file or option that is wrong. Nobody is asked before a layer needs a key.
    """
    providers: list[KeyProvider] = [FileKeys(keys.files)]
    if keys.ocicrypt_config:
        providers.append(ProviderKeys.load(Path(keys.ocicrypt_config)))
    if keys.cdh.address:
        providers.append(cdh.provider(keys.cdh, accept_a256ctr=keys.accept_a256ctr))
    if keys.kbs.url:
        providers.append(PacketKeys(kbs.client(keys.kbs), accept_a256ctr=keys.accept_a256ctr))
    return providers[0] if len(providers) == 1 else AnyOf(providers)


def any_configured(keys: config.Keys) -> bool:
    """Whether there is anybody at all who could open a layer."""
    return bool(keys.files or keys.ocicrypt_config or keys.cdh.address or keys.kbs.url)
