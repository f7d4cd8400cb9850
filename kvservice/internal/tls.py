"""Certificates for gRPC, from PEM files. Knows nothing of what is served, and nothing of settings.

A server looks at its files at each handshake and takes new ones when all of them fit together, so that a renewal needs
no restart; a client reads them when it connects.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvservice.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PemFiles:
    """A certificate, its private key, and the authority that the other side's certificate must be of."""

    cert: Path | None
    key: Path | None
    ca: Path | None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The contents of certificate, key and authority.

        Raises:
            ConfigError: a file can't be read, isn't PEM, or certificate and key don't fit; nothing of them is told.
        """
        if (self.cert is None) != (self.key is None):
            raise ConfigError("TLS: a certificate needs its key, and a key its certificate: give both or neither")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.cert is not None and self.key is not None:
                context.load_cert_chain(self.cert, self.key)
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            return _content(self.cert), _content(self.key), _content(self.ca)
        except ssl.SSLError:
            named = ", ".join(str(path) for path in (self.cert, self.key, self.ca) if path is not None)
            raise ConfigError(
                f"TLS files {named}: must be PEM, and certificate and key a pair; check them with openssl"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"TLS file {error.filename or self.cert}: {error.strerror}; give a readable file"
            ) from None

    def state(self) -> tuple[object, ...]:
        """Changes with the files."""
        return tuple(_state(path) for path in (self.cert, self.key, self.ca))


def server_credentials(files: PemFiles) -> grpc.ServerCredentials:
    """What a server shows; with an authority, clients must show a certificate of it.

    Raises:
        ConfigError: see `PemFiles.read`.
    """
    watch = _Watch(files)
    return grpc.dynamic_ssl_server_credentials(
        watch.first,
        watch.changed,  # type: ignore[arg-type] # its stub forgets None, which the documentation allows
        require_client_authentication=files.ca is not None,
    )


def channel_credentials(files: PemFiles) -> grpc.ChannelCredentials:
    """What a client shows and whom it trusts; without an authority, those that gRPC brings.

    Raises:
        ConfigError: see `PemFiles.read`.
    """
    cert, key, ca = files.read()
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def server_name_options(server_name: str) -> Sequence[tuple[str, str]]:
    """Has a client expect `server_name` in the certificate, whatever the address."""
    return (("grpc.ssl_target_name_override", server_name),) if server_name else ()


class _Watch:
    """The files of a server. Asked from gRPC's own threads."""

    def __init__(self, files: PemFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = files.state()
        self.first = _configuration(files)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificates, or None to go on with those in use."""
        with self._lock:
            state = self._files.state()
            if state == self._seen:
                return None
            self._seen = state
            try:
                configuration = _configuration(self._files)
            except ConfigError as error:
                # In the middle of a renewal the files may not fit together.
                logger.warning("certificates_not_read", extra={"why": error.message})
                return None
            logger.info("certificates_read", extra={"cert": str(self._files.cert)})
            return configuration


def _configuration(files: PemFiles) -> grpc.ServerCertificateConfiguration:
    cert, key, ca = files.read()
    if cert is None or key is None:
        raise ConfigError("TLS: a server needs a certificate and its key")
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)


def _content(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _state(path: Path | None) -> tuple[int, ...] | None:
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
