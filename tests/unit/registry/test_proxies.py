"""Proxies of the environment: a forward proxy that wants a password, and who is reached without it."""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from yarl import URL

from snapshotter.digest import Digest
from snapshotter.errors import RegistryUnavailable
from snapshotter.registry.proxies import proxy_for
from snapshotter.registry.reference import Reference
from tests.harness.sim_registry import SimRegistry
from tests.unit.registry.conftest import Clients

CONTENT = b"content of a blob" * 100
DIGEST = Digest.of(CONTENT)
LOGIN = "Basic " + base64.b64encode(b"me:hunter2").decode()


class ForwardProxy:
    """CONNECT and absolute URLs (RFC 9110 §9.3.6, RFC 9112 §3.2.2). Every name leads to `target`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            line, *headers = head.decode().split("\r\n")
            self.asked.append(line)
            if f"Proxy-Authorization: {LOGIN}" not in headers:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            else:
                host, _, port = self._target.partition(":")
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
                if line.startswith("CONNECT "):
                    writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                else:
                    far_writer.write(head.replace(b"Proxy-Authorization", b"X-Seen"))
                await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
        writer.close()


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[SimRegistry]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("registry.invalid").configure_cert(context)
    async with SimRegistry(tls=context) as registry:
        registry.add_blob(CONTENT)
        yield registry


async def test_tls_goes_through_a_tunnel_and_the_registry_learns_nothing_of_the_proxy(
    secure: SimRegistry, clients: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ForwardProxy(secure.address)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as listening:
        address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        image = Reference.parse("registry.invalid/team/app:1")
        monkeypatch.setenv("https_proxy", f"http://me:hunter2@{address}")
        monkeypatch.delenv("no_proxy", raising=False)
        client = await clients.make(ca_file=str(tmp_path / "ca.pem"), retries=0)
        assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
        assert proxy.asked == ["CONNECT registry.invalid:443 HTTP/1.1"]
        assert "Proxy-Authorization" not in secure.seen[0].headers

        monkeypatch.setenv("https_proxy", f"http://me:hunter3@{address}")
        client = await clients.make(ca_file=str(tmp_path / "ca.pem"), retries=0)
        with pytest.raises(RegistryUnavailable) as caught:
            await client.blob(image, DIGEST, len(CONTENT), 1 << 20)
        assert "hunter" not in f"{caught.value!r}"
        await client.__aexit__()


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("", "https://registry.example", False),
        ("", "https://127.8.9.1:5000", True),
        ("", "https://[::1]:5000", True),
        ("", "http://localhost", True),
        ("*", "https://registry.example", True),
        ("registry.example", "https://registry.example", True),
        ("*.example", "https://registry.example", True),
        ("*.example", "https://example", False),
        ("2001:DB8:0::1", "https://[2001:db8::1]", True),
        ("example", "https://registry.EXAMPLE", True),
        (".example", "https://registry.example", True),
        (".registry.example", "https://registry.example", False),
        ("gistry.example", "https://registry.example", False),
        ("a, registry.example:5000", "https://registry.example:5000", True),
        ("registry.example:5000", "https://registry.example", False),
        ("registry.example:443", "https://registry.example", True),
        ("10.0.0.0/8", "https://10.1.2.3", True),
        ("10.0.0.0/8", "https://11.1.2.3", False),
        ("10.0.0.0/8", "https://registry.example", False),
        ("10.1.2.3", "https://10.1.2.3:5000", True),
        ("2.3", "https://10.1.2.3", False),
        ("fd00::/8", "https://[fd00::1]", True),
        ("[fd00::1]:5000", "https://[fd00::1]:5000", True),
        ("fd00::1", "https://[fd00::1]:5000", True),
        ("a/b, ,:,[]", "https://10.1.2.3", False),
    ],
)
def test_no_proxy(no_proxy: str, url: str, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    proxy, headers = proxy_for(URL(url))
    assert (proxy is None) is direct
    assert headers == {}
    assert direct or str(proxy) == "http://proxy.example:3128"
