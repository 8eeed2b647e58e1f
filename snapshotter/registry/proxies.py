"""HTTP(S)_PROXY and NO_PROXY of the environment, as Go programs (containerd) read them. Loopback is never proxied.

Source: golang.org/x/net/http/httpproxy.
"""

import base64
import ipaddress
from urllib.request import getproxies_environment

from yarl import URL

from snapshotter.errors import ConfigError


def proxy_for(url: URL) -> tuple[URL | None, dict[str, str]]:
    """The proxy for a request, and headers for it. Raises ConfigError, which does not show the proxy's URL."""
    proxies = getproxies_environment()
    text = proxies.get(url.scheme)
    if not text or _goes_direct(url, proxies.get("no", "")):
        return None, {}
    try:
        proxy = URL(text if "://" in text else f"http://{text}")
        login = base64.b64encode(f"{proxy.user or ''}:{proxy.password or ''}".encode()).decode()
        headers = {"Proxy-Authorization": f"Basic {login}"} if proxy.user else {}
        usable = proxy.scheme in ("http", "https") and bool(proxy.host)
        proxy = proxy.with_user(None)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"environment: {url.scheme}_proxy is not the URL of an HTTP proxy")
    return proxy, headers


def _goes_direct(url: URL, no_proxy: str) -> bool:
    host, port = (url.host or "").lower().rstrip("."), url.port
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    for entry in no_proxy.lower().split(","):
        name = entry.strip()
        if name == "*":
            return True
        if "/" in name:
            if address is not None and address in _network(name):
                return True
            continue
        before, colon, after = name.rpartition(":")
        if colon and after.isdigit() and (":" not in before or before.endswith("]")):
            if int(after) != port:
                continue
            name = before
        name = name.strip("[]").removeprefix("*")
        if address is not None and address == _address(name):
            return True
        if name and (host == name or (address is None and host.endswith(name if name[0] == "." else f".{name}"))):
            return True
    return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return ipaddress.IPv4Network("255.255.255.255/32")  # what is no network has nobody in it
