"""The certificate of Content Credentials: made, read, refused and replaced."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes import settings_in
from pydantic import ValidationError

from stable_diffusion_server.app.credentials import ServerCredentials, make_certificate
from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.imaging import ContentSigner
from stable_diffusion_server.settings import Settings

pytest.importorskip("c2pa")


def _pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _self_signed(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 5, now, now + timedelta(days=1))
    return made.sign(key, SHA256()).public_bytes(Encoding.PEM)


def _opened(settings: Settings) -> ContentSigner:
    credentials = ServerCredentials(settings)
    credentials.open()
    assert credentials.signer is not None
    return credentials.signer


def test_the_certificate_may_sign_and_nothing_else() -> None:
    """C2PA's profile: digital signature, an end entity, an extended usage that readers accept."""
    leaf, issuer = x509.load_pem_x509_certificates(make_certificate())
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    extended = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.EMAIL_PROTECTION]
    leaf.verify_directly_issued_by(issuer)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_damaged_certificate_of_our_own_is_replaced(tmp_path: Path, content: bytes) -> None:
    """The old file is kept aside."""
    settings = settings_in(tmp_path)
    settings.data_dir.mkdir()
    (settings.data_dir / "content-credentials.pem").write_bytes(content)
    first = _opened(settings).fingerprint
    assert _opened(settings).fingerprint == first
    assert len(list(settings.data_dir.iterdir())) == 2


def test_a_key_of_another_certificate_is_refused_by_name(tmp_path: Path) -> None:
    """As is a file that is no key, and one that is not there."""
    mine, others = tmp_path / "mine.pem", tmp_path / "others.pem"
    mine.write_bytes(make_certificate())
    others.write_bytes(make_certificate())
    for key in (others, tmp_path / "absent.pem", Path(__file__)):
        settings = settings_in(tmp_path, credentials_certificate=mine, credentials_key=key)
        with pytest.raises(StorageUnavailable) as refusal:
            ServerCredentials(settings).open()
        assert "PRIVATE KEY" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"credentials_key": "pkcs11:token=a;object=b"},
        {"credentials_certificate": "PKCS11:token=a", "credentials_key": "a.pem"},
        {"credentials_key": "a.pem"},
        {"content_credentials": "maybe"},
    ],
)
def test_settings_that_cannot_sign_are_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    """A key in a hardware module is refused plainly, and one of certificate and key alone."""
    with pytest.raises(ValidationError):
        settings_in(tmp_path, **changes)


def test_keys_that_c2pa_does_not_take_are_refused() -> None:
    """Another curve, and a short RSA key."""
    signer = ContentSigner()
    short = rsa.generate_private_key(65537, 1024)  # noqa: S505  # short on purpose
    for key in (ec.generate_private_key(ec.SECP256K1()), short):
        with pytest.raises(ValueError, match="none that C2PA takes"):
            signer.open(_self_signed(key), _pem(key))
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(ValueError, match="cannot sign"):  # C2PA wants an issuer and the right usages
        signer.open(_self_signed(key), _pem(key))
