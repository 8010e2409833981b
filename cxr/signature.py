"""Who made an archive: the check of the signature in the file beside it.

The format is that of OpenSSF model-signing: a Sigstore bundle, in it a DSSE envelope, in it an
in-toto statement with the archive's SHA-256. `cxr archive --sign` lets model-signing itself write
it. Reading it needs no more than `cryptography`: model-signing's own check would bring clients for
HTTP, TUF and Sigstore into each serving process, none of which a key pair needs.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from cxr.config import file_sha256
from cxr.errors import ModelLoadError

# What model-signing hashes the statement with, for each curve that it takes.
CURVES: dict[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"


class SignatureError(ModelLoadError):
    """The archive is unsigned, altered or signed by another key; the message says which."""


class KeyFileError(ModelLoadError):
    """A file does not hold the key that is needed."""


def signature_path(archive: Path) -> Path:
    """Where the signature of an archive is: beside it."""
    return archive.with_name(archive.name + ".sig")


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Read the public half of a key pair.

    Raises:
        KeyFileError: no public elliptic-curve key in PEM, or none of a curve in `CURVES`.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"Cannot read the key {path}: {error.strerror}.") from error
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise KeyFileError(
            f"{path} is not a public elliptic-curve key (P-256, P-384 or P-521) in PEM; "
            f"make it from the private one: openssl pkey -in KEY.pem -pubout -out {path.name}"
        )
    return key


def check(archive: Path, signature: Path, key: ec.EllipticCurvePublicKey) -> None:
    """Check that the holder of a key has signed an archive, whatever its name and place.

    Args:
        archive: the file; only its SHA-256 is looked at, none of its content.
        signature: the signature of it.
        key: the public key of who may sign.

    Raises:
        SignatureError: unsigned, altered, or signed by another key.
    """
    signed = _signed_sha256(archive.name, signature, key)
    if signed != file_sha256(archive):
        raise SignatureError(
            f"{archive.name} is altered: it is not the file that {signature.name} was made for; "
            "get the archive that was signed."
        )


def _signed_sha256(archive: str, signature: Path, key: ec.EllipticCurvePublicKey) -> str:
    """The digest that the holder of the key has signed."""
    bundle, payload, proof = _read(archive, signature)
    try:
        key.verify(proof, _pre_authentication_encoding(payload), ec.ECDSA(CURVES[key.curve.name]))
    except InvalidSignature as error:
        if not _names(bundle, key):
            raise SignatureError(
                f"{archive} is signed by another key than the one to verify with; "
                "get the archive from a source you trust, or give the public key of its signer."
            ) from error
        raise SignatureError(
            f"{signature.name} is altered: its content is not what was signed; "
            f"get the one that was made for {archive}."
        ) from error
    return _sha256_of_statement(signature.name, payload)


def _read(archive: str, signature: Path) -> tuple[Any, bytes, bytes]:
    """A signature's bundle, and the statement and its proof in it; none of it is verified."""
    try:
        bundle: Any = json.loads(signature.read_bytes())
        envelope = bundle["dsseEnvelope"]
        (signed,) = envelope["signatures"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        proof = base64.b64decode(signed["sig"], validate=True)
    except FileNotFoundError as error:
        raise SignatureError(
            f"{archive} is unsigned: there is no {signature.name} beside it; "
            "sign it with `cxr archive BUNDLE --out FILE.mar --sign KEY.pem`."
        ) from error
    except OSError as error:
        raise SignatureError(f"Cannot read {signature.name}: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SignatureError(
            f"{signature.name} is altered: it is not a signature in the format of OpenSSF "
            f"model-signing; get the one that was made for {archive}."
        ) from error
    return bundle, payload, proof


def _sha256_of_statement(signature: str, payload: bytes) -> str:
    """The digest in a statement that is known to be authentic."""
    try:
        statement: Any = json.loads(payload)
        predicate = statement["predicate"]
        (resource,) = predicate["resources"]
        kind = (
            statement["_type"],
            statement["predicateType"],
            predicate["serialization"]["method"],
            resource["name"],
            resource["algorithm"],
        )
        digest = resource["digest"]
    except (KeyError, TypeError, ValueError):
        kind, digest = None, None
    # "." is the signed file itself; a signed folder has the names of its files here.
    if kind != (_STATEMENT_TYPE, _PREDICATE_TYPE, "files", ".", "sha256"):
        raise SignatureError(
            f"{signature} does not sign one file by its SHA-256; "
            "sign the archive with `cxr archive BUNDLE --out FILE.mar --sign KEY.pem`."
        )
    return str(digest)


def _pre_authentication_encoding(payload: bytes) -> bytes:
    """What a DSSE signature is made over: type and content, each with its length."""
    return b"DSSEv1 %d %s %d %s" % (
        len(_PAYLOAD_TYPE),
        _PAYLOAD_TYPE.encode(),
        len(payload),
        payload,
    )


def _names(bundle: Any, key: ec.EllipticCurvePublicKey) -> bool:
    """Whether a bundle says that it was signed by that key.

    This is not signed itself: it decides nothing, it only tells two causes of a failure apart.
    """
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    except (KeyError, TypeError):
        return False
    return bool(hint == hashlib.sha256(pem).hexdigest())
