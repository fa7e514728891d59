"""Certificates for gRPC, on both sides of a channel: files in, grpc credentials out.

A listener's files are read again when one of them has changed, at the next handshake: a renewed certificate needs no
restart. What a renewal leaves broken is logged, and the former certificate stays. A caller's files are read when its
channel is opened. Reading is plain; `server_credentials` hands grpc a function that it calls on a thread of its own.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from splitserve.core.config import ClientTls, TlsSettings
from splitserve.core.errors import ConfigError
from splitserve.core.files import Watched
from splitserve.telemetry.logs import Logger


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files hold. `ca` and the pair are None where no file was named."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None


def server_credentials(tls: TlsSettings) -> grpc.ServerCredentials:
    """Raises ConfigError naming the setting and the file that can't be used."""
    watched, logger = Watched(_server_files(tls), lambda: read_server(tls)), Logger("tls")

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at every handshake; None: as before."""
        try:
            news = watched.look()
        except ConfigError as error:
            logger.warning("renewed certificate not usable; the former one stays", reason=str(error))
            return None
        if news is None:
            return None
        logger.info("certificate renewed", files=", ".join(watched.files))
        return _configuration(news)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(watched.first), renewed, require_client_authentication=tls.client_ca is not None
    )


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """Raises ConfigError naming the setting and the file that can't be used."""
    pem = read_client(tls)
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)


def read_server(tls: TlsSettings, setting: str = "tls") -> Pem:
    """A listener's files, checked; `setting` is where they are named. Raises ConfigError."""
    _check_pair(setting, tls.certificate, tls.key)
    return Pem(_authorities(f"{setting}.client_ca", tls.client_ca), _bytes(tls.certificate), _bytes(tls.key))


def read_client(tls: ClientTls, setting: str = "tls") -> Pem:
    """A caller's files, checked; `setting` is where they are named. Raises ConfigError."""
    ca = _authorities(f"{setting}.ca", tls.ca)
    if tls.certificate is None or tls.key is None:
        return Pem(ca)
    _check_pair(setting, tls.certificate, tls.key)
    return Pem(ca, _bytes(tls.certificate), _bytes(tls.key))


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.ca)


def _server_files(tls: TlsSettings) -> tuple[str, ...]:
    return tuple(file for file in (tls.certificate, tls.key, tls.client_ca) if file is not None)


def _bytes(file: str) -> bytes:
    return Path(file).read_bytes()


def _check_pair(setting: str, certificate: str, key: str) -> None:
    """gRPC fails without a reason at the first handshake; OpenSSL says here what is wrong."""
    for name, file in (("certificate", certificate), ("key", key)):
        _check_readable(f"{setting}.{name}", file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"{setting}.certificate",
            f"{certificate} and the key {key} can't be used together ({reason}); both must be PEM, the key unencrypted "
            "and the certificate's own",
        ) from error


def _authorities(setting: str, file: str | None) -> bytes | None:
    if file is None:
        return None
    _check_readable(setting, file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except ssl.SSLError as error:
        raise ConfigError(setting, f"{file} holds no CA certificate in PEM ({error.reason})") from error
    return _bytes(file)


def _check_readable(setting: str, file: str) -> None:
    try:
        _bytes(file)
    except OSError as error:
        raise ConfigError(setting, f"{file} can't be read: {error.strerror}") from error
