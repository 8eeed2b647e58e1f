"""Policy that came with the machine."""

from pathlib import Path

import msgspec
import pytest

from snapshotter.config import Config, Kbs, Keys, Policy, RepositoryRule
from snapshotter.errors import ConfigError
from snapshotter.image.initdata import with_initdata

A, B = (f"registry.example/app@sha256:{digit * 64}" for digit in "ab")


def settings(tmp_path: Path, text: str, policy: Policy) -> Config:
    path = tmp_path / "initdata.toml"
    path.write_text(text)
    merged = {"pins": policy.pins, "require": policy.require, "repositories": policy.repositories}
    return Config(policy=Policy(initdata=str(path), **merged))  # type: ignore[arg-type]


def document(policy: str, entry: str = "coco-snapshotter.toml") -> str:
    return f"algorithm = \"sha384\"\nversion = \"0.1.0\"\n[data]\n\"{entry}\" = '''\n{policy}'''\n\"aa.toml\" = ''\n"


def test_pins_and_rules_add_up_and_the_rest_is_replaced(tmp_path: Path) -> None:
    text = document(
        f'[policy]\npins = ["{B}"]\nrequire = "pinned"\nfile = "kbs:///default/policy/app"\n'
        '[[policy.repositories]]\nname = "registry.example"\nsealed = true\n'
    )
    rules = (RepositoryRule(name="registry.example"), RepositoryRule(name="other.example", authentic=True))
    merged = with_initdata(settings(tmp_path, text, Policy(pins=(A,), repositories=rules))).policy
    assert merged.pins == (A, B)
    assert (merged.require, merged.file) == ("pinned", "kbs:///default/policy/app")
    assert merged.repositories == (RepositoryRule(name="registry.example", sealed=True), rules[1])


def test_without_initdata_nothing_changes() -> None:
    assert with_initdata(Config()) == Config()


@pytest.mark.parametrize(
    "text",
    [
        "", "not toml", 'algorithm = "md5"\n[data]\n', document("", "policy.rego"), document(""), document("[policy"),
        document("[policy]\nunknown = 1\n"), document('[policy]\npins = "x"\n'), document("[policy]\n[keys]\n"),
        document('[policy]\ninitdata = "/other"\n'), document("#" * (1 << 20)),
    ],
)  # fmt: skip
def test_initdata_without_a_policy_that_is_understood_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="initdata"):
        with_initdata(settings(tmp_path, text, Policy()))


@pytest.mark.parametrize(
    "raw",
    [
        document("[policy]\n").encode() + b"# \xff\n", document("[policy]\n").encode("utf-16"),
        document("[policy]\n").encode() + b"x = " + b"9" * 5000, document("[policy]\nx = " + "9" * 5000).encode(),
        b"x = " + b"[" * 50_000, document("[policy]\nx = " + "[" * 50_000).encode(), b"\0",
        b'algorithm = ["sha256"]\n[data]\n', b'algorithm = 7\ndata = []\n', b"data = 1979-05-27\n",
        document("policy = 1\n").encode(), document("[[policy]]\n").encode(),
        document("[policy]\npins = [1979-05-27]\n").encode(), document("[policy]\nrepositories = [[]]\n").encode(),
        b'algorithm = "sha256"\n[data]\n"coco-snapshotter.toml" = 7\n',
    ],
    ids=map(str, range(15)),
)  # fmt: skip
def test_initdata_of_another_type_or_no_text_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "initdata.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=f"initdata {path}"):
        with_initdata(Config(policy=Policy(initdata=str(path))))


def test_a_missing_initdata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        with_initdata(Config(policy=Policy(initdata=str(tmp_path / "none"))))
    for name in ("\0", "\ud800"):  # which no file can have
        with pytest.raises(ConfigError, match="cannot be read"):
            with_initdata(Config(policy=Policy(initdata=f"{tmp_path}/{name}")))


def test_what_is_obeyed_is_what_is_attested(tmp_path: Path) -> None:
    wanted = settings(tmp_path, document(f'[policy]\npins = ["{A}"]\n'), Policy())
    assert with_initdata(wanted).keys.kbs.init_data == wanted.policy.initdata
    other = Keys(kbs=Kbs(init_data="/run/other.toml"))
    with pytest.raises(ConfigError, match=r"keys\.kbs\.init_data, which is attested, /run/other\.toml"):
        with_initdata(msgspec.structs.replace(wanted, keys=other))


def test_initdata_cut_anywhere_is_refused_or_whole_up_to_there(tmp_path: Path) -> None:
    whole = document(f'[policy]\nrequire = "pinned"\npins = ["{A}"]\n')
    accepted = []
    for length in range(len(whole) + 1):
        try:
            accepted.append(with_initdata(settings(tmp_path, whole[:length], Policy())).policy)
        except ConfigError:
            continue
    assert accepted
    assert {(policy.require, policy.pins) for policy in accepted} == {("pinned", (A,))}, "never a part of the policy"
