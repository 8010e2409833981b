"""Signs archives with OpenSSF model-signing and an elliptic-curve key, without any network."""

from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from model_signing import signing

from cxr.signature import CURVES, KeyFileError, check, signature_path


def signer(key_file: Path) -> Callable[[Path], Path]:
    """Make the function that signs archives with a key, so that a bad key shows before any work.

    Args:
        key_file: a private elliptic-curve key in PEM.

    Returns:
        Signs the archive that it is given, and returns the signature's path, beside the archive.
        The signature appears whole or not at all.

    Raises:
        KeyFileError: no private elliptic-curve key, none of a curve in `CURVES`, or one behind a
            password.
    """
    public = _load_private_key(key_file).public_key()
    config = signing.Config()  # type: ignore[no-untyped-call]
    config.use_elliptic_key_signer(private_key=key_file)

    def sign(archive: Path) -> Path:
        path = signature_path(archive)
        partial = path.with_name(path.name + ".part")
        try:
            config.sign(archive, partial)
            # What no server would take must not get out.
            check(archive, partial, public)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    return sign


def _load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise KeyFileError(f"Cannot read the key {path}: {error.strerror}.") from error
    except TypeError as error:  # how `cryptography` asks for a password
        raise KeyFileError(
            f"{path} is protected by a password, which is not supported; "
            "write the key without one: openssl pkey -in PROTECTED.pem -out KEY.pem"
        ) from error
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise KeyFileError(
            f"{path} is not a private elliptic-curve key (P-256, P-384 or P-521) in PEM; make one: "
            "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY.pem"
        )
    return key
