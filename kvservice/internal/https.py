"""Certificates for HTTP servers, from the same PEM files as gRPC's. Knows nothing of what is served.

As with gRPC, a server looks at its files at each handshake and takes new ones when all of them fit together.
"""

from __future__ import annotations

import logging
import ssl

from kvservice.errors import ConfigError
from kvservice.internal.tls import PemFiles

logger = logging.getLogger(__name__)


def server_context(files: PemFiles) -> ssl.SSLContext:
    """What an HTTP server shows; with an authority, clients must show a certificate of it.

    Raises:
        ConfigError: see `PemFiles.read`.
    """
    context = _context(files)
    watch = _Watch(files, context)
    context.sni_callback = watch.at_handshake
    return context


class _Watch:
    """The files of a server, looked at within its event loop."""

    def __init__(self, files: PemFiles, context: ssl.SSLContext) -> None:
        self._files = files
        self._seen = files.state()
        self._current = context

    def at_handshake(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Has the connection use the newest certificate."""
        del name, context
        state = self._files.state()
        if state != self._seen:
            self._seen = state
            try:
                self._current = _context(self._files)
                logger.info("certificates_read", extra={"cert": str(self._files.cert)})
            except ConfigError as error:
                # In the middle of a renewal the files may not fit together.
                logger.warning("certificates_not_read", extra={"why": error.message})
        connection.context = self._current


def _context(files: PemFiles) -> ssl.SSLContext:
    files.read()
    if files.cert is None or files.key is None:
        raise ConfigError("TLS: a server needs a certificate and its key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.cert, files.key)
    if files.ca is not None:
        context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
