"""The key provider that a configuration asks for."""

from pathlib import Path

from snapshotter import config
from snapshotter.keys.protocol import ProviderKeys
from snapshotter.keys.provider import AnyOf, FileKeys, KeyProvider


def provider(keys: config.Keys) -> KeyProvider:
    """Key files first, then the providers of `ocicrypt_config`. Raises ConfigError naming the file that is wrong."""
    files = FileKeys(keys.files)
    if not keys.ocicrypt_config:
        return files
    return AnyOf([files, ProviderKeys.load(Path(keys.ocicrypt_config))])
