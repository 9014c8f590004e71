"""Encodes pixels as PNG, WebP or JPEG with embedded metadata, and signs the files with Content Credentials (C2PA)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import structlog
from PIL import Image

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.imaging.metadata import exif_with_record, png_text
from stable_diffusion_server.imaging.resize import Pixels
from stable_diffusion_server.types import Format

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_log = structlog.get_logger(__name__)

# Method 2 of 0..6: about the file size of the default 4 in half the time.
_WEBP_METHOD = 2
# For lossless WebP `quality` sets the effort; 100 takes several times as long for a few bytes less.
_LOSSLESS_EFFORT = 20
# A JPEG segment has at most 65,535 bytes, two of them for its length. Long prompts exceed that.
_JPEG_EXIF_BYTES = 65_533
# The library would add a thumbnail of up to 1 MB, check each signature that it has just made, and follow addresses.
_C2PA_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "core": {"allowed_network_hosts": []},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
}
# C2PA's algorithms by the size of a key on an elliptic curve: the hash, and the bytes of each half of a signature.
_CURVES = {256: ("Es256", "SHA256", 32), 384: ("Es384", "SHA384", 48), 521: ("Es512", "SHA512", 66)}
_LEAST_RSA_BITS = 2048


def encode_image(
    pixels: Pixels, file_format: Format, quality: int, record: Mapping[str, object] | None, xmp: str = ""
) -> bytes:
    """Encode pixels as an image file.

    Args:
        pixels: uint8, height × width × 3.
        file_format: Format of the file.
        quality: 1..100. WebP is lossless at 100; PNG is always lossless.
        record: Generation parameters to embed as JSON (in EXIF, in PNG as text chunks), or `None`. A JPEG gets only
            `digest` of a record that is too long for it.
        xmp: XMP packet to embed, or an empty string.
    """
    image = Image.fromarray(pixels)
    target = io.BytesIO()
    match file_format:
        case Format.PNG:
            image.save(target, "PNG", compress_level=1, pnginfo=png_text(record, xmp))
        case Format.WEBP:
            lossless = quality == 100
            effort = _LOSSLESS_EFFORT if lossless else quality
            metadata = {"exif": exif_with_record(record), "xmp": xmp.encode()}
            image.save(target, "WEBP", quality=effort, lossless=lossless, method=_WEBP_METHOD, **metadata)
        case Format.JPEG:
            exif = exif_with_record(record)
            if record is not None and len(exif) > _JPEG_EXIF_BYTES:
                exif = exif_with_record({"digest": record.get("digest")})  # the history has the record
            metadata = {"exif": exif} | ({"xmp": xmp.encode()} if xmp else {})
            image.save(target, "JPEG", quality=quality, **metadata)
    return target.getvalue()


class Sandbox(Protocol):
    """Signs files that have ingredients, and reads credentials: `DecoderPool.handle_credentials`."""

    async def __call__(
        self,
        head: Mapping[str, object],
        files: Sequence[bytes],
        field: str,
        /,
        *,
        sign: Callable[[bytes], bytes] | None = ...,
        share: str = ...,
    ) -> bytes:
        """Return the signed file, or what its credentials say as JSON."""


class ContentSigner:
    """Signs files with Content Credentials (C2PA 2), once it has a key. Thread-safe.

    It reads only files that this server encoded; a file with inputs of callers is signed in the `sandbox`, which asks
    for `sign_bytes` and never has the key.
    """

    def __init__(self) -> None:
        self.sandbox: Sandbox | None = None
        self.chain = ""
        self.anchor = ""
        self.serial = ""
        self.algorithm = ""
        self.fingerprint = ""
        self._key: PrivateKeyTypes | None = None
        self._signer: Any = None
        self._context: Any = None

    def open(self, chain: bytes, key: bytes) -> None:
        """Take the certificate with those that issued it, and its private key, as PEM.

        Raises `ValueError` with what is wrong with them.
        """
        import c2pa
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

        try:
            leaf, *issuers = x509.load_pem_x509_certificates(chain)
            self._key = load_pem_private_key(key, None)
        except (TypeError, ValueError) as error:  # TypeError: the key needs a password
            raise ValueError("the certificate or the key is not a PEM file without a password") from error
        own = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        if leaf.public_key().public_bytes(*own) != self._key.public_key().public_bytes(*own):
            raise ValueError("the key is not that of the first certificate")
        self.chain, self.algorithm = chain.decode(), _algorithm_of(self._key)
        # An issuer gives each number once, so both together tell a certificate (RFC 5280, 4.1.2.2).
        self.anchor = (issuers or [leaf])[-1].public_bytes(Encoding.PEM).decode()
        self.serial = str(leaf.serial_number)
        self.fingerprint = hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest()
        kind = c2pa.C2paSigningAlg[self.algorithm.upper()]
        try:
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(kind, chain, key, None))
            self._context = c2pa.Context(c2pa.Settings.from_json(json.dumps(_C2PA_SETTINGS)))
            blank = encode_image(np.zeros((1, 1, 3), np.uint8), Format.PNG, 100, None)
            self.sign(blank, Format.PNG, {"assertions": []})
        except c2pa.C2paError as error:
            raise ValueError(f"the certificate cannot sign Content Credentials ({str(error)[:200]})") from error

    def sign(self, file: bytes, file_format: Format, manifest: Mapping[str, object]) -> bytes:
        """Return a file that this server encoded, with signed credentials. Anything written later breaks them."""
        import c2pa

        target = io.BytesIO()
        with c2pa.Builder(dict(manifest), self._context) as builder:
            builder.sign(self._signer, file_format.content_type, io.BytesIO(file), target)
        return target.getvalue()

    async def sign_edited(
        self, file: bytes, file_format: Format, manifest: Mapping[str, object], inputs: Sequence[bytes], share: str
    ) -> bytes:
        """Return a file with signed credentials that keep those of `inputs`, the ingredients in the manifest.

        If inputs crash, stall or confuse the sandbox, the credentials name them without their content. `share`
        identifies the caller.
        """
        head = {"format": file_format.content_type, "manifest": manifest}
        head |= {"chain": self.chain, "algorithm": self.algorithm}
        if self.sandbox is not None:
            try:
                return await self.sandbox(head, (file, *inputs), "image", sign=self.sign_bytes, share=share)
            except ServerError as error:
                _log.warning("the credentials of an input image cannot be kept", reason=type(error).__name__)
        return await asyncio.to_thread(self.sign, file, file_format, manifest)

    def sign_bytes(self, data: bytes) -> bytes:
        """Return the signature of the bytes of a claim, in COSE's form (RFC 9053)."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        match self._key:
            case ec.EllipticCurvePrivateKey() as key:
                _, name, half = _CURVES[key.key_size]
                halves = decode_dss_signature(key.sign(data, ec.ECDSA(getattr(hashes, name)())))
                return b"".join(number.to_bytes(half, "big") for number in halves)
            case rsa.RSAPrivateKey() as key:
                hashed = hashes.SHA256()
                return key.sign(data, padding.PSS(padding.MGF1(hashed), padding.PSS.DIGEST_LENGTH), hashed)
            case ed25519.Ed25519PrivateKey() as key:
                return key.sign(data)
        raise ValueError("there is no key to sign with")


def _algorithm_of(key: PrivateKeyTypes) -> str:
    """Return C2PA's name of the algorithm of a key. Raises `ValueError` for a key that C2PA does not take."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match key:
        case ec.EllipticCurvePrivateKey() if key.key_size in _CURVES and key.curve.name.endswith("r1"):
            return _CURVES[key.key_size][0]
        case rsa.RSAPrivateKey() if key.key_size >= _LEAST_RSA_BITS:
            return "Ps256"
        case ed25519.Ed25519PrivateKey():
            return "Ed25519"
    raise ValueError("the key is none that C2PA takes: P-256, P-384, P-521, Ed25519, or RSA of 2048 bits")
