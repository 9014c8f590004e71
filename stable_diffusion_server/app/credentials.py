"""Opens the signer of Content Credentials: reads its certificate and key, or makes them in DATA_DIR."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import structlog

from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.files import quarantine
from stable_diffusion_server.imaging import ContentSigner
from stable_diffusion_server.settings import Settings

_log = structlog.get_logger(__name__)

# Long, since a file without a time stamp counts as invalid once its certificate has run out.
_LIFE = timedelta(days=3650)
_EARLIER = timedelta(hours=1)  # for clocks of readers that are behind
_MAX_BYTES = 1_000_000


class ServerCredentials:
    """The signer of this server, `None` where images are not signed; `open` gives it the certificate."""

    def __init__(self, settings: Settings) -> None:
        wanted = settings.content_credentials or ("on" if find_spec("c2pa") is not None else "off")
        signs = wanted == "on" and settings.embed_metadata != "none"
        self.signer = ContentSigner() if signs else None
        self._chosen = settings.credentials_certificate, settings.credentials_key
        self._file = settings.data_dir / "content-credentials.pem"

    def open(self) -> None:
        """Read or make certificate and key. Of several processes that make them, the first wins.

        A damaged file of our own is quarantined and replaced. Raises `StorageUnavailable` with a sentence for
        `/readyz`.
        """
        if self.signer is None:
            return
        certificate, key = self._chosen
        try:
            if certificate is not None and key is not None:
                self.signer.open(_read(certificate), _read(key))
            else:
                self._open_own(self.signer)
        except ValueError as error:
            raise StorageUnavailable(f"CREDENTIALS_CERTIFICATE with CREDENTIALS_KEY: {error}.") from error
        except OSError as error:
            raise StorageUnavailable(f"The key of Content Credentials cannot be read ({error.strerror}).") from error
        _log.info("images are signed with Content Credentials", certificate_sha256=self.signer.fingerprint)

    def _open_own(self, signer: ContentSigner) -> None:
        if self._file.exists() or self._file.is_symlink():
            try:
                return _open_pair(signer, _read(self._file))
            except (OSError, ValueError) as error:
                quarantine(self._file, getattr(error, "strerror", None) or str(error))
        part = self._file.with_suffix(f".{uuid4().hex}.part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(make_certificate())
        try:
            os.link(part, self._file)
        except FileExistsError:
            pass  # another process was first
        finally:
            part.unlink()
        return _open_pair(signer, _read(self._file))


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {_MAX_BYTES} bytes")
    return data


def _open_pair(signer: ContentSigner, pair: bytes) -> None:
    """Open a signer with a file that holds its key and then its certificates."""
    key, mark, chain = pair.partition(b"-----BEGIN CERTIFICATE-----")
    signer.open(mark + chain, key)


def make_certificate() -> bytes:
    """Return a new key on P-256 and its certificates as PEM, with the usages that C2PA asks for.

    The key of the issuer is not kept, so nobody can issue another certificate with it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now, curve = datetime.now(UTC), ec.SECP256R1()
    issuer_key, key = ec.generate_private_key(curve), ec.generate_private_key(curve)

    def certificate(name: str, public: ec.EllipticCurvePublicKey, *, issues: bool) -> x509.Certificate:
        # Digital signature alone for the signer, certificates alone for its issuer (C2PA 2.2, 14.5.1).
        usage = x509.KeyUsage(not issues, False, False, False, False, issues, issues, False, False)
        made = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("Stable Diffusion Server, made at its first start"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLIER)
            .not_valid_after(now + _LIFE)
            .add_extension(x509.BasicConstraints(ca=issues, path_length=0 if issues else None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if not issues:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        return made.sign(issuer_key, SHA256())

    def named(name: str) -> x509.Name:
        values = ((NameOID.COMMON_NAME, name), (NameOID.ORGANIZATION_NAME, "Stable Diffusion Server"))
        return x509.Name([x509.NameAttribute(kind, value) for kind, value in values])

    leaf = certificate("Stable Diffusion Server", key.public_key(), issues=False)
    root = certificate("Stable Diffusion Server, made at its first start", issuer_key.public_key(), issues=True)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private + leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM)
