"""Which directories `serve` accepts for its state."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from snapshotter.config import Config
from snapshotter.errors import ConfigError
from snapshotter.mounts import placement
from snapshotter.mounts.mountinfo import mount_of

pytestmark = pytest.mark.root


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on tmpfs."""
    path = Path("/dev/shm", f"coco-placement-{os.getpid()}")
    path.mkdir(mode=0o700)
    yield path
    for child in path.iterdir():
        child.rmdir()
    path.rmdir()


def settings(root: Path, **more: object) -> Config:
    table = {"root": str(root), "cache_dir": "/var/cache/x", "address": "/run/x/sock"} | more
    return msgspec.convert(table, Config)


def refusal(config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        placement.check(config)
    return caught.value


def test_root_that_does_not_exist_yet_is_accepted_and_not_made(tmp_path: Path) -> None:
    placement.check(settings(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_root_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root").chmod(mode)
    error = refusal(settings(tmp_path / "root"))
    assert error.reason == "root-directory"
    assert f"{mode:04o}" in str(error)


def test_root_in_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """Who owns a directory above can rename root away and put another one there."""
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", 1000, 1000)
    assert "owner 1000" in str(refusal(settings(tmp_path / "home" / "root")))


def test_root_is_judged_where_its_link_leads(tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose").chmod(0o777)
    (tmp_path / "root").symlink_to("loose")
    assert refusal(settings(tmp_path / "root")).reason == "root-directory"


@pytest.mark.parametrize("character", [",", ":", "\\", "\n"])
def test_root_that_mount_options_cannot_hold_is_refused_also_behind_a_link(tmp_path: Path, character: str) -> None:
    place = tmp_path / f"a{character}b"
    assert repr(str(place)) in str(refusal(settings(place)))
    place.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(place)
    assert refusal(settings(tmp_path / "link")).reason == "path"


def test_paths_of_sockets_are_short_enough(tmp_path: Path) -> None:
    longest = tmp_path / ("x" * (107 - len(f"{tmp_path}//snapshotd.sock")))
    placement.check(settings(longest))
    assert "too long" in str(refusal(settings(Path(f"{longest}x"))))
    (tmp_path / "link").symlink_to(f"{longest}x")
    assert "too long" in str(refusal(settings(tmp_path / "link")))
    address = f"{tmp_path}/{'ü' * ((107 - len(f'{tmp_path}/')) // 2)}"
    placement.check(settings(tmp_path / "root", address=address))
    assert "too long" in str(refusal(settings(tmp_path / "root", address=f"{address}yz")))


@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o1777, 0), (0o770, 0), (0o700, 1000)])
def test_address_where_others_could_put_their_socket_is_refused(tmp_path: Path, mode: int, owner: int) -> None:
    place = tmp_path / "run"
    place.mkdir()
    placement.check(settings(tmp_path / "root", address=f"{place}/sock"))
    place.chmod(mode)
    os.chown(place, owner, 0)
    for address in (place / "sock", place / "missing" / "sock"):
        found = refusal(settings(tmp_path / "root", address=str(address))) if mode != 0o1777 else None
        assert found is None or f"owner {owner} and mode {mode:04o}" in str(found)
    assert "address" in str(refusal(settings(tmp_path / "root", address=f"{place}/sock")))
    table = {"image_service": {"listen": f"{place}/kubelet.sock"}}  # the kubelet sends it logins
    assert "image_service.listen" in str(refusal(settings(tmp_path / "root", registry=table)))


def test_address_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no directory" in str(refusal(settings(tmp_path / "root", address=f"{tmp_path}/file/sock")))


def test_too_few_descriptors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (200, 255))
    assert "LimitNOFILE" in str(refusal(settings(tmp_path / "root")))
    monkeypatch.setattr("resource.getrlimit", lambda _: (200, 256))
    placement.check(settings(tmp_path / "root"))


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    assert "no directory" in str(refusal(settings(tmp_path / "root")))


def test_confidential_refuses_a_root_that_the_host_can_change(tmp_path: Path) -> None:
    if mount_of(tmp_path).kind == "tmpfs":
        pytest.skip("the temporary directory is a tmpfs")
    error = refusal(settings(tmp_path / "root", mode="confidential"))
    assert error.reason == "untrusted-root"
    assert "trusted_devices" in str(error)
    assert error.exit_code == 2


def test_confidential_accepts_a_tmpfs(memory: Path) -> None:
    placement.check(settings(memory / "root", mode="confidential"))
    placement.check(settings(memory, mode="confidential"))


def test_confidential_accepts_a_trusted_device_by_number(tmp_path: Path) -> None:
    device = mount_of(tmp_path).device
    placement.check(settings(tmp_path / "root", mode="confidential", trusted_devices=("259:0", device)))


def test_confidential_accepts_a_trusted_device_by_path(tmp_path: Path) -> None:
    major, minor = map(int, mount_of(tmp_path).device.split(":"))
    if major == 0:
        pytest.skip("the temporary directory is on no block device")
    os.mknod(tmp_path / "device", 0o60600, os.makedev(major, minor))
    trusted = (str(tmp_path / "absent"), str(tmp_path / "device"))
    placement.check(settings(tmp_path / "root", mode="confidential", trusted_devices=trusted))


def test_what_is_no_block_device_makes_nothing_trusted(tmp_path: Path) -> None:
    error = refusal(settings(tmp_path, mode="confidential", trusted_devices=("/dev/null", str(tmp_path), "")))
    assert error.reason == "untrusted-root"


@pytest.mark.parametrize(("root", "cache"), [("", "cache"), ("cache/root", "cache"), ("", "")])
def test_confidential_keeps_cache_and_root_apart(memory: Path, root: str, cache: str) -> None:
    error = refusal(settings(memory / root, mode="confidential", cache_dir=str(memory / cache)))
    assert error.reason == "directories"
    placement.check(settings(memory / root, cache_dir=str(memory / cache)))  # open: no secret to lose


def test_confidential_sees_through_links_between_cache_and_root(memory: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(memory)
    assert refusal(settings(memory, mode="confidential", cache_dir=str(tmp_path / "cache"))).reason == "directories"


def test_confidential_refuses_a_socket_inside_the_cache(memory: Path, tmp_path: Path) -> None:
    error = refusal(
        settings(memory, mode="confidential", cache_dir=str(tmp_path), address=str(tmp_path / "run" / "sock"))
    )
    assert "address" in str(error)


@pytest.mark.parametrize(
    ("line", "trusted", "fine"),
    [
        ("/dev/zram0 partition 1048572 0 -2", (), True),
        ("/swapfile file 1048572 0 -2", (), False),
        ("/dev/vdb partition 1048572 0 -2", ("253:16",), False),
        ("/absent file 1048572 0 -2", ("/dev/null", "", "/absent"), False),
    ],
)
def test_confidential_refuses_swap_that_the_host_can_read(line: str, trusted: tuple[str, ...], fine: bool) -> None:
    text = re.sub(" +", "\t", f"Filename Type Size Used Priority\n{line}\n")
    if fine:
        placement.check_swap(trusted, text)
    else:
        with pytest.raises(ConfigError, match="swap space"):
            placement.check_swap(trusted, text)
