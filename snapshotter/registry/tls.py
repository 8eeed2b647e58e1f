"""TLS contexts: one for all hosts, and one for each way in which a host is configured to differ."""

import ssl
from collections import OrderedDict

from snapshotter.errors import ConfigError
from snapshotter.registry.endpoint import Tls

_MOST = 64


class TlsContexts:
    """A context is kept, so that connections that were made with it are used again."""

    def __init__(self, ca_file: str) -> None:
        """`ca_file`: authorities to trust besides the system's, "" = none. Raises ConfigError when it is not usable."""
        self._ca_file = ca_file
        self._contexts: OrderedDict[Tls, ssl.SSLContext] = OrderedDict()
        self._default = self._make(Tls())

    def get(self, tls: Tls | None) -> ssl.SSLContext:
        """Raises ConfigError naming the file that cannot be used."""
        if tls is None:
            return self._default
        if tls not in self._contexts:
            self._contexts[tls] = self._make(tls)
            while len(self._contexts) > _MOST:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(tls)
        return self._contexts[tls]

    def _make(self, tls: Tls) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self._ca_file:
            _trust(context, self._ca_file, "config: registry.ca_file")
        for file in tls.authorities:
            _trust(context, file.path, "hosts_dir: ca")
        for certificate, key in tls.client:
            try:
                context.load_cert_chain(certificate.path, key.path, password=_no_password)
            except (OSError, ssl.SSLError, ValueError) as error:
                ours = isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror
                reason = ours or "not a certificate and its key, in PEM and without a password"
                raise ConfigError(f"hosts_dir: client {certificate.path}: {reason}") from None
        if tls.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _trust(context: ssl.SSLContext, path: str, what: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise ConfigError(f"{what} {path}: not PEM") from None
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from error


def _no_password() -> str:
    """Instead of OpenSSL asking on the terminal."""
    return ""
