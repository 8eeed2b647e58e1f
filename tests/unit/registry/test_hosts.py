"""hosts.toml and certificate directories: which hosts are tried, in which order, and how each is spoken to."""

import os
from pathlib import Path

import pytest
import trustme

from snapshotter.errors import ConfigError
from snapshotter.registry.endpoint import Endpoint
from snapshotter.registry.hosts import Hosts
from snapshotter.registry.reference import Reference
from snapshotter.registry.tls import TlsContexts
from tests.harness.logs import everything

REGISTRY = Reference.parse("registry.example:5000/team/app:1")


@pytest.fixture
def certs_d(tmp_path: Path) -> Path:
    return tmp_path


def hosts(directory: Path, reference: Reference = REGISTRY, *, plain_http: tuple[str, ...] = ()) -> list[Endpoint]:
    return list(Hosts(str(directory), plain_http, TlsContexts("")).of(reference))


def urls(directory: Path, reference: Reference = REGISTRY) -> list[str]:
    return [str(host.url) for host in hosts(directory, reference)]


def write(directory: Path, text: str, name: str = "registry.example:5000") -> Path:
    (directory / name).mkdir(exist_ok=True)
    path = directory / name / "hosts.toml"
    path.write_text(text)
    return path


def test_without_a_directory_a_registry_serves_itself(certs_d: Path) -> None:
    assert urls(certs_d) == ["https://registry.example:5000/v2"]
    assert urls(certs_d, Reference.parse("busybox")) == ["https://registry-1.docker.io/v2"]
    assert urls(certs_d, Reference.parse("127.0.0.1:5000/a")) == ["http://127.0.0.1:5000/v2"]
    assert [str(h.url) for h in hosts(certs_d, plain_http=("registry.example:5000",))] == [
        "http://registry.example:5000/v2"
    ]


def test_hosts_come_in_the_order_of_the_file_and_the_server_last(certs_d: Path) -> None:
    write(
        certs_d,
        """
        server = "https://upstream.example"
        [host."https://b.example"]
        capabilities = ["pull"]
        [host."https://b.example".header]
        x-One = "1"
        Two = ["2", "3"]
        [host."http://a.example:80/some/path"]
        capabilities = ["pull", "RESOLVE"]
        dial_timeout = "1m1.5s"
        [host."c.example/own/root"]
        override_path = true
        [host."https://d.example/v2"]
        """,
    )
    b, a, c, d, server = hosts(certs_d)
    assert [str(host.url) for host in (b, a, c, d, server)] == [
        "https://b.example/v2",
        "http://a.example/some/path/v2",
        "https://c.example/own/root",
        "https://d.example/v2",
        "https://upstream.example/v2",
    ]
    assert (b.pulls, b.resolves, b.pushes) == (True, False, False)
    assert (a.pulls, a.resolves, a.pushes) == (True, True, False)
    assert (server.pulls, server.resolves, server.pushes) == (True, True, True)
    assert b.own_headers == {"X-One": "1", "Two": "2, 3"}
    assert "2, 3" not in repr(b)
    assert a.connect_seconds == 61.5
    assert str(c.at("team/app/blobs/x")) == "https://c.example/own/root/team/app/blobs/x?ns=registry.example:5000"
    assert [host.host for host in (b, a, c, d, server)] == [
        "b.example", "a.example:80", "c.example", "d.example", "upstream.example"
    ]  # fmt: skip


def test_without_a_server_the_registry_itself_is_last_and_is_not_told_its_own_name(certs_d: Path) -> None:
    write(certs_d, '[host."https://mirror.example"]', "docker.io")
    mirror, registry = hosts(certs_d, Reference.parse("busybox"))
    assert (mirror.host, str(mirror.at("x"))) == ("mirror.example", "https://mirror.example/v2/x?ns=docker.io")
    assert (registry.host, str(registry.at("x"))) == ("docker.io", "https://registry-1.docker.io/v2/x")
    write(certs_d, 'server = "https://registry-1.docker.io"', "docker.io")
    assert hosts(certs_d, Reference.parse("busybox")) == [registry]


def test_the_first_directory_that_is_there_counts(certs_d: Path) -> None:
    for name in ("_default", "registry.example:5000", "registry.example_5000_"):
        write(certs_d, f'[host."https://{name.replace(":", "-").strip("_")}.example"]', name)
        assert urls(certs_d)[0] == f"https://{name.replace(':', '-').strip('_')}.example/v2"
    assert urls(certs_d, Reference.parse("other.example/a"))[0] == "https://default.example/v2"


@pytest.mark.allow_warnings
def test_certificates_without_a_hosts_file(certs_d: Path) -> None:
    authority = trustme.CA()
    directory = certs_d / "registry.example:5000"
    directory.mkdir()
    authority.cert_pem.write_to_path(str(directory / "ca.crt"))
    issued = authority.issue_cert("client.example")
    issued.private_key_pem.write_to_path(str(directory / "client.key"))
    issued.cert_chain_pems[0].write_to_path(str(directory / "client.cert"))
    [host] = hosts(certs_d)
    assert host.tls is not None
    assert [Path(file.path).name for file in host.tls.authorities] == ["ca.crt"]
    assert [[Path(file.path).name for file in pair] for pair in host.tls.client] == [["client.cert", "client.key"]]
    (directory / "client.key").write_text("nothing")
    with pytest.raises(ConfigError, match=r"client.*client\.cert: not a certificate"):
        hosts(certs_d)


def test_certificates_are_relative_to_the_file(certs_d: Path) -> None:
    write(certs_d, 'ca = "ca.pem"\n[host."https://m.example"]\nskip_verify = true')
    trustme.CA().cert_pem.write_to_path(str(certs_d / "registry.example:5000" / "ca.pem"))
    mirror, registry = hosts(certs_d)
    assert mirror.tls is not None
    assert mirror.tls.skip_verify
    assert registry.tls is not None
    assert registry.tls.authorities[0].path == str(certs_d / "registry.example:5000" / "ca.pem")


def test_plain_http_with_tls_settings_means_tls_first(certs_d: Path) -> None:
    write(certs_d, '[host."http://m.example:5000"]\nskip_verify = true\n[host."http://n.example"]\nskip_verify = true')
    assert urls(certs_d)[:3] == ["https://m.example:5000/v2", "http://m.example:5000/v2", "http://n.example/v2"]


@pytest.mark.parametrize(
    "text",
    [
        "server = 7",
        "= nothing",
        '[host."https://user:hunter2@m.example"]',
        '[host."https://user:hunter2@m.example:port"]',
        '[host."ftp://m.example"]',
        '[host."https://m.example?x=hunter2"]',
        '[host."https://m.example"]\ncapabilities = ["fly"]',
        '[host."https://m.example"]\ndial_timeout = "soon"',
        '[host."https://m.example"]\nca = "missing.pem"',
        '[host."https://m.example"]\nclient = [["a", "b", "c"]]',
        '[host."https://m.example"]\nclient = [[]]',
        '[host."https://m.example".header]\nAuthorization = "hunter2\\nX: y"',
        '[host."https://m.example".header]\nAuthorization = ["hunter2", 7]',
        '[host."https://m.example".header]\n"bad name" = "hunter2"',
        "\n".join(f'[host."https://m{i}.example"]' for i in range(65)),
    ],
)
@pytest.mark.allow_warnings
def test_a_wrong_file_fails_its_own_registry_and_shows_no_secret(
    certs_d: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(certs_d, text)
    known = Hosts(str(certs_d), (), TlsContexts(""))
    for _ in range(2):
        with pytest.raises(ConfigError, match="hosts_dir: ") as caught:
            known.of(REGISTRY)
        assert "hunter2" not in f"{caught.value!r} {everything(caplog.records)}"
    assert len(caplog.records) == 1
    assert len(known.of(Reference.parse("other.example/a"))) == 1


@pytest.mark.allow_warnings
def test_changes_count_at_once(certs_d: Path) -> None:
    known = Hosts(str(certs_d), (), TlsContexts(""))

    def first() -> str:
        return str(known.of(REGISTRY)[0].url)

    assert first() == "https://registry.example:5000/v2"
    path = write(certs_d, '[host."https://one.example"]')
    assert first() == "https://one.example/v2"
    path.write_text('[host."https://two.example"]')
    os.utime(path, ns=(1, 1))
    assert first() == "https://two.example/v2"
    path.write_text('[host."https://two.example"]\nca = "ca.pem"')
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        first()
    trustme.CA().cert_pem.write_to_path(str(path.parent / "ca.pem"))
    assert first() == "https://two.example/v2"
    before = known.of(REGISTRY)[0].tls
    trustme.CA().cert_pem.write_to_path(str(path.parent / "ca.pem"))
    assert known.of(REGISTRY)[0].tls != before
    path.unlink()
    (path.parent / "ca.pem").unlink()
    assert first() == "https://registry.example:5000/v2"
    path.parent.rmdir()
    assert first() == "https://registry.example:5000/v2"
