"""Certificates for tests, made by the program openssl."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM files."""

    certificate: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """Of a server that shows it."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.key)
        return context


@dataclass(frozen=True)
class Authority:
    """Signs certificates; keeps all files in a folder."""

    folder: Path
    name: str = "authority"

    def __post_init__(self) -> None:
        subject = ("-subj", f"/CN={self.name}", "-days", "2")
        self._openssl("req", "-x509", *_NEW_KEY, "-keyout", f"{self.name}.key", "-out", f"{self.name}.pem", *subject)

    @property
    def certificate(self) -> Path:
        return self.folder / f"{self.name}.pem"

    def issue(self, name: str, alternative_names: str = "", *, common_name: str | None = None) -> Pair:
        """``alternative_names`` such as ``"DNS:localhost,URI:spiffe://mesh/a"``."""
        request, extensions = f"{name}.csr", self.folder / f"{name}.extensions"
        subject = f"/CN={name if common_name is None else common_name}"
        self._openssl("req", *_NEW_KEY, "-keyout", f"{name}.key", "-out", request, "-subj", subject)
        extensions.write_text(f"subjectAltName={alternative_names}\n" if alternative_names else "")
        signer = ("-CA", f"{self.name}.pem", "-CAkey", f"{self.name}.key", "-CAcreateserial", "-days", "2")
        self._openssl("x509", "-req", "-in", request, *signer, "-out", f"{name}.pem", "-extfile", extensions.name)
        return Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")

    def server(self, name: str = "server") -> Pair:
        return self.issue(name, "DNS:localhost,IP:127.0.0.1")

    def channel_credentials(self, client: Pair | None = None) -> grpc.ChannelCredentials:
        """Of a client that trusts this authority."""
        own = (client.key.read_bytes(), client.certificate.read_bytes()) if client else (None, None)
        return grpc.ssl_channel_credentials(self.certificate.read_bytes(), *own)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=self.folder, check=True, capture_output=True)
