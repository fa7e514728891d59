"""A CA of one's own, and what it vouches for: PEM files for tests of TLS."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitserve.core.config import ClientTls, TlsSettings

_DAY = timedelta(days=1)


class Authority:
    """Writes into `directory`; `ca` is the file that whoever believes it needs."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        constraint = x509.BasicConstraints(ca=True, path_length=0)
        made = _begun(self._name, self._name, self._key).add_extension(constraint, critical=True)
        self.ca = _written(directory / f"{name}.pem", made.sign(self._key, hashes.SHA256()))

    def issue(self, name: str, *hosts: str) -> tuple[str, str]:
        """The files of a certificate for these hosts (default: 127.0.0.1 and localhost) and its key, written anew."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([_alternative(host) for host in hosts or ("127.0.0.1", "localhost")])
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        begun = _begun(_named(name), self._name, key).add_extension(names, critical=False)
        made = begun.add_extension(usage, critical=False).sign(self._key, hashes.SHA256())
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (self.directory / f"{name}.key").write_bytes(secret)
        return _written(self.directory / f"{name}.pem", made), str(self.directory / f"{name}.key")

    def server(self, name: str = "server", *hosts: str, mutual: bool = False) -> TlsSettings:
        certificate, key = self.issue(name, *hosts)
        return TlsSettings(certificate=certificate, key=key, client_ca=self.ca if mutual else None)

    def client(self, name: str = "client") -> ClientTls:
        certificate, key = self.issue(name)
        return ClientTls(ca=self.ca, certificate=certificate, key=key)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _begun(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
    )


def _written(file: Path, certificate: x509.Certificate) -> str:
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return str(file)
