"""The gateway's certificate: the same settings and checks as a gRPC listener's, as a context for OpenSSL.

Files that have changed are read again at the next handshake, so that a renewed certificate needs no restart; what a
renewal leaves broken is logged, and the former certificate stays. On one event loop.
"""

import ssl

from splitserve.core.config import TlsSettings
from splitserve.core.errors import ConfigError
from splitserve.core.files import Watched
from splitserve.rpc.tls import read_server
from splitserve.telemetry.logs import Logger


def ssl_context(tls: TlsSettings) -> ssl.SSLContext:
    """Raises ConfigError naming the setting and the file that can't be used."""
    files = [file for file in (tls.certificate, tls.key, tls.client_ca) if file is not None]
    watched, logger = Watched(files, lambda: _loaded(tls)), Logger("tls")
    current = watched.first

    def on_hello(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        nonlocal current
        try:
            current = watched.look() or current
        except ConfigError as error:
            logger.warning("renewed certificate not usable; the former one stays", reason=str(error))
        if current is not first:
            connection.context = current

    watched.first.sni_callback = on_hello
    return watched.first


def _loaded(tls: TlsSettings) -> ssl.SSLContext:
    read_server(tls)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
