"""Names of images: the distribution grammar, Docker's short forms, and locations of the command line."""

from pathlib import Path

import pytest

from snapshotter.digest import Digest
from snapshotter.errors import BadReference
from snapshotter.registry.reference import LayoutLocation, Reference, RegistryLocation, parse_location

DIGEST = Digest.of(b"x")


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("busybox", "docker.io", "library/busybox", None, None),
        ("busybox:1.36", "docker.io", "library/busybox", "1.36", None),
        ("team/app", "docker.io", "team/app", None, None),
        ("docker.io/busybox", "docker.io", "library/busybox", None, None),
        ("index.docker.io/library/busybox", "docker.io", "library/busybox", None, None),
        ("localhost/app", "localhost", "app", None, None),
        ("localhost:5000/a/b/c:t", "localhost:5000", "a/b/c", "t", None),
        ("127.0.0.1:5000/app", "127.0.0.1:5000", "app", None, None),
        ("[::1]:5000/app:1", "[::1]:5000", "app", "1", None),
        ("Registry.Example/app", "registry.example", "app", None, None),
        (f"r.example/a@{DIGEST}", "r.example", "a", None, DIGEST),
        (f"r.example/a:t@{DIGEST}", "r.example", "a", "t", DIGEST),
        ("r.example/a__b/c-d.e--f:_T.-x", "r.example", "a__b/c-d.e--f", "_T.-x", None),
    ],
)
def test_a_reference_has_parts(text: str, host: str, repository: str, tag: str | None, digest: Digest | None) -> None:
    reference = Reference.parse(text)
    assert reference == Reference(host, repository, tag, digest)
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "/app",
        "app/",
        "a//b",
        "App",
        "UPPER/app",
        "r.example/App",
        "r.example/a_-b",
        "r.example/-a",
        "r.example/../b",
        "r.example/a:",
        "r.example/a:-t",
        "r.example/a:" + "t" * 129,
        "r.example/" + "a" * 256,
        "r.example:0/a",
        "r.example:65536/a",
        "r.example:port/a",
        "-r.example/a",
        "r..example/a",
        "[::1/a",
        "[:::1]/a",
        "r.example/a@sha256:00",
        "r.example/a@sha512:" + "0" * 128,
        f"r.example/a@{DIGEST}@{DIGEST}",
        f"r.example/a@{DIGEST}\n",
        "r.example/a:t\n",
        "r.example/a b",
        "http://r.example/a",
        "0" * 64,
        "user@r.example/a",
        "r.example/a:٣",
        "x" * 1025,
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(BadReference):
        Reference.parse(text)


def test_what_a_registry_is_asked_for() -> None:
    assert Reference.parse("r.example/a").target == "latest"
    assert Reference.parse("r.example/a:t").target == "t"
    assert Reference.parse(f"r.example/a:t@{DIGEST}").target == DIGEST
    assert str(Reference.parse("r.example/a:t").pinned(DIGEST)) == f"r.example/a@{DIGEST}"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1:5000", True),
        ("127.9.9.9", True),
        ("[::1]:5000", True),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("10.0.0.1:5000", False),
        ("registry.example", False),
    ],
)
def test_only_loopback_is_loopback(host: str, loopback: bool) -> None:
    assert Reference.parse(f"{host}/a").is_loopback is loopback


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("docker://localhost:5000/a:t", RegistryLocation(Reference("localhost:5000", "a", "t"))),
        ("docker://busybox", RegistryLocation(Reference("docker.io", "library/busybox"))),
        ("oci:/tmp/x", LayoutLocation(Path("/tmp/x"))),
        ("oci:/tmp/x:t", LayoutLocation(Path("/tmp/x"), "t")),
        ("oci:x", LayoutLocation(Path("x"))),
        (f"oci:a@b/x:t@{DIGEST}", LayoutLocation(Path("a@b/x"), "t", DIGEST)),
        (f"oci:x@{DIGEST}", LayoutLocation(Path("x"), None, DIGEST)),
        ("oci:/a:b/x", LayoutLocation(Path("/a:b/x"))),
    ],
)
def test_a_location_has_a_transport(text: str, location: RegistryLocation | LayoutLocation) -> None:
    assert parse_location(text) == location
    assert parse_location(str(location)) == location


@pytest.mark.parametrize(
    "text",
    [
        "",
        "busybox",
        "oci:",
        "oci::t",
        "oci:x:",
        "oci:x:a/b:",
        "oci:x@sha256:1",
        "oci:x\0",
        "docker:busybox",
        "docker://",
        "dir:x",
    ],
)
def test_what_is_no_location_is_refused(text: str) -> None:
    with pytest.raises(BadReference):
        parse_location(text)


@pytest.mark.parametrize("text", ["oci:0:0/", "oci:a/b:c/", "oci:a/b:c/:tag", "oci:dir:tag", "oci:dir"])
def test_a_layout_whose_name_holds_a_colon_survives_its_text(text: str) -> None:
    location = parse_location(text)
    assert parse_location(str(location)) == location
