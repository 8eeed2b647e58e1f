"""Policy that came with the machine: the entry `coco-snapshotter.toml` of a measured initdata document.

Initdata (Kata Containers, initdata-spec) is TOML: `algorithm`, `version`, and files by name under `[data]`. Its digest
is part of what the TEE attests, so a host that changes it gets no keys from a key broker whose policy looks at it.
"""

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from snapshotter.config import Config, Policy
from snapshotter.errors import ConfigError
from snapshotter.files import read_regular

ENTRY = "coco-snapshotter.toml"
_BYTES = 1 << 20
_ALGORITHMS = ("sha256", "sha384", "sha512")


def with_initdata(settings: Config) -> Config:
    """The configuration with `[policy]` of the initdata laid over its own; unchanged if none is configured.

    Pins and rules add up; of two rules for one name, and of everything else, initdata's counts. Raises ConfigError,
    also for initdata without a policy, which is a mistake. The KBS is sent the same: what is obeyed is attested.
    """
    path = settings.policy.initdata
    if not path:
        return settings
    kbs = settings.keys.kbs
    if kbs.init_data not in ("", path):
        raise ConfigError(
            f"config: policy.initdata is {path}, but keys.kbs.init_data, which is attested, {kbs.init_data}"
        )
    raw = read_regular(Path(path), _BYTES)
    if raw is None:
        raise ConfigError(f"initdata {path}: cannot be read, or is larger than {_BYTES} bytes")
    stated = _policy(raw, path)
    if stated.initdata:
        raise ConfigError(f"initdata {path}: policy.initdata makes no sense here")
    own = settings.policy
    policy = Policy(
        require=stated.require if stated.require != "any" else own.require,
        pins=tuple(dict.fromkeys((*own.pins, *stated.pins))),
        file=stated.file or own.file,
        lookaside=stated.lookaside or own.lookaside,
        initdata=path,
        repositories=tuple({rule.name: rule for rule in (*own.repositories, *stated.repositories)}.values()),
    )
    keys = msgspec.structs.replace(settings.keys, kbs=msgspec.structs.replace(kbs, init_data=path))
    return msgspec.structs.replace(settings, policy=policy, keys=keys)


def _policy(raw: bytes, path: str) -> Policy:
    document = _toml(raw, f"initdata {path}")
    files = document.get("data")
    if document.get("algorithm") not in _ALGORITHMS or not isinstance(files, dict):
        raise ConfigError(f"initdata {path}: no initdata document (algorithm, version, [data])")
    text = files.get(ENTRY)
    if not isinstance(text, str):
        raise ConfigError(f"initdata {path}: [data] has no {ENTRY!r}")
    table = _toml(text.encode(), f"initdata {path}: {ENTRY}")
    if table.keys() != {"policy"}:
        raise ConfigError(f"initdata {path}: {ENTRY}: holds [policy] and nothing else")
    try:
        return msgspec.convert(table["policy"], Policy)
    except msgspec.ValidationError as error:
        raise ConfigError(f"initdata {path}: {ENTRY}: {error}") from error


def _toml(raw: bytes, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # also of UTF-8, and of numbers that Python does not convert
        raise ConfigError(f"{what}: {error}") from error
