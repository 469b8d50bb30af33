"""The server's side of TLS: certificates from files, read again whenever these change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from headrace.server.config import Settings, SettingsError

Configuration = grpc.ServerCertificateConfiguration


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """``None``: no TLS. With ``tls_client_ca`` every client must have a certificate (mutual TLS). Raises SettingsError
    for files that cannot be read or do not belong together; once it serves, such files change nothing.
    """
    files = _files(settings)
    if files is None:
        return None
    certificates = _Certificates(files)
    return grpc.dynamic_ssl_server_credentials(
        certificates.configuration,
        certificates.changed,  # type: ignore[arg-type]  # None: no change, as grpc's documentation has it
        require_client_authentication=files.client_ca is not None,
    )


@dataclass(frozen=True, slots=True)
class _Files:
    certificate: Path
    key: Path
    client_ca: Path | None


class _Certificates:
    """grpc asks for a change before each handshake, in threads of its own."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._stamps = _stamps(files)
        self.configuration = _read(files)

    def changed(self) -> Configuration | None:
        """What is new; ``None``: nothing, or nothing that could be used, such as a certificate whose key has not come
        yet.
        """
        # Before they are read: what changes meanwhile is seen the next time.
        stamps = _stamps(self._files)
        if stamps == self._stamps:
            return None
        self._stamps = stamps
        log = structlog.get_logger("headrace.server")
        try:
            self.configuration = _read(self._files)
        except SettingsError as error:
            log.warning("certificates_kept", problem=str(error))
            return None
        log.info("certificates_changed")
        return self.configuration


def _files(settings: Settings) -> _Files | None:
    if settings.tls_certificate is None or settings.tls_key is None:
        for name in ("tls_certificate", "tls_key", "tls_client_ca"):
            if getattr(settings, name) is not None:
                missing = [need for need in ("tls_certificate", "tls_key") if getattr(settings, need) is None]
                raise SettingsError(f"{name}: needs {' and '.join(missing)}")
        return None
    return _Files(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)


def _stamps(files: _Files) -> tuple[tuple[int, int, int] | None, ...]:
    """What tells a file from what it was before; ``None`` where there is none."""
    return tuple(_stamp(path) for path in (files.certificate, files.key, files.client_ca) if path is not None)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(files: _Files) -> Configuration:
    """Grpc takes what does not fit together, and then fails every handshake, so OpenSSL is asked first. Raises
    SettingsError.
    """
    certificate = _content("tls_certificate", files.certificate)
    key = _content("tls_key", files.key)
    client_ca = None if files.client_ca is None else _content("tls_client_ca", files.client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password, though none fits, keeps OpenSSL from asking for one on the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"tls_key: {files.key} is not the key of the certificate in {files.certificate}"
        else:
            problem = (
                f"tls_certificate, tls_key: {files.certificate} must have certificates and {files.key} a private key"
                f" without passphrase, both in PEM ({error.reason or 'not PEM'})"
            )
        raise SettingsError(problem) from None
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError:
            raise SettingsError(f"tls_client_ca: {files.client_ca} must have certificates in PEM") from None
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)


def _content(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: cannot read {path}: {error.strerror}") from None
