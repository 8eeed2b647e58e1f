"""Where a redirect may lead, and how long its target may be used again. Pure.

Registries send blob reads to signed URLs of object stores. Such a URL is a credential of its own: it is kept in memory
for a short while, gets no Authorization of ours, and appears in no error.
"""

import re
from collections import OrderedDict
from collections.abc import Hashable
from datetime import UTC, datetime

from yarl import URL

from snapshotter.errors import RegistryUnavailable

REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
MAX_HOPS = 10

_LONGEST_SECONDS = 300.0
_MARGIN_SECONDS = 20.0
_MAX_URL = 16 << 10
_MAX_REMEMBERED = 1024
_URL_CHARACTERS = re.compile(r"[!-~]+")  # no spaces: the URL goes into a request line as it is


def next_hop(what: str, current: URL, location: str | None) -> URL:
    """The URL a redirect leads to. Raises RegistryUnavailable unless it is HTTP(S) and no step down to plain HTTP."""
    if not location or len(location) > _MAX_URL or not _URL_CHARACTERS.fullmatch(location):
        raise RegistryUnavailable(f"{what}: redirect without a usable Location")
    try:
        target = current.join(URL(location, encoded=True)).with_fragment(None)
        host, port, has_login = target.host, target.port, target.raw_user is not None or target.raw_password is not None
    except (ValueError, TypeError):
        raise RegistryUnavailable(f"{what}: redirect without a usable Location") from None
    if target.scheme not in ("http", "https") or not host or port is None or has_login:
        raise RegistryUnavailable(f"{what}: redirect without a usable Location")
    if current.scheme == "https" and target.scheme != "https":
        raise RegistryUnavailable(
            f"{what}: redirect from HTTPS to plain HTTP refused", hint="the registry announces a wrong external URL"
        )
    return target


def same_origin(one: URL, other: URL) -> bool:
    """Scheme, host and port (RFC 6454 §5)."""
    return one.origin() == other.origin()


def lifetime_seconds(url: URL, now: float) -> float:
    """How long a redirect target may be used again, from the expiry its signature states; at most five minutes."""
    limit = _LONGEST_SECONDS
    query = url.query
    for name, relative in (("X-Amz-Expires", True), ("X-Goog-Expires", True), ("Expires", False)):
        text = query.get(name, "")
        if text.isascii() and text.isdigit() and len(text) <= 12:
            limit = min(limit, int(text) - (0.0 if relative else now) - _MARGIN_SECONDS)
    try:
        if "se" in query:  # Azure: an absolute date
            moment = datetime.fromisoformat(query["se"])
            limit = min(limit, moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - now - _MARGIN_SECONDS)
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, limit)


class RedirectCache:
    """Targets by blob, least recently used out first. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._targets: OrderedDict[Hashable, tuple[URL, float]] = OrderedDict()

    def get(self, key: Hashable, now: float) -> URL | None:
        known = self._targets.get(key)
        if known is None:
            return None
        url, expires = known
        if now >= expires:
            del self._targets[key]
            return None
        self._targets.move_to_end(key)
        return url

    def put(self, key: Hashable, url: URL, expires: float) -> None:
        self._targets[key] = (url, expires)
        self._targets.move_to_end(key)
        while len(self._targets) > _MAX_REMEMBERED:
            self._targets.popitem(last=False)

    def drop(self, key: Hashable, url: URL) -> None:
        """Forget `url`, unless somebody has already put a newer one in its place."""
        known = self._targets.get(key)
        if known is not None and known[0] == url:
            del self._targets[key]
