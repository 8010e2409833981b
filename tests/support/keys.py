"""Elliptic-curve key pairs, as files."""

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat

P256 = ec.SECP256R1()


@dataclass(frozen=True)
class KeyPair:
    private: Path
    public: Path


def make_keys(folder: Path, name: str = "key", curve: ec.EllipticCurve = P256) -> KeyPair:
    """Write a new key pair, as `openssl genpkey` and `openssl pkey -pubout` do."""
    key = ec.generate_private_key(curve)
    pair = KeyPair(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    pair.private.write_bytes(private_pem(key))
    pair.public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return pair


def private_pem(key: PrivateKeyTypes, password: bytes | None = None) -> bytes:
    """Any private key in PEM."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
