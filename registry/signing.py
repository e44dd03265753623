"""Signing: DSSE envelopes under an Ed25519 key that lies in the folder of secrets, its public half to be handed out."""

import json
from binascii import Error as NotBase64
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer._crypto_signer import CryptoSigner
from securesystemslib.signer._key import SSlibKey

from riverdelta.core.digests import canonical_json
from riverdelta.core.errors import BadInput, Corrupt
from riverdelta.core.keys import secret_file

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_BEGINS = b'{"payload":"'
_FILE = "certificates.key"


def _new() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _signer(folder: Path) -> CryptoSigner:
    try:
        key = load_pem_private_key(secret_file(folder, _FILE, _new), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Corrupt(f"{_FILE} is no private key: {error}.", "Restore the key folder from a backup.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Corrupt(f"{_FILE} is not an Ed25519 key.", "Restore the key folder from a backup.")
    return CryptoSigner(key)


def public_pem(folder: Path) -> bytes:
    """The public key of a folder of secrets, to be published."""
    if not (folder / _FILE).exists():
        raise BadInput(f"{folder} holds no {_FILE}.", "Give the issuer's public key with --key.")
    key = load_pem_private_key(secret_file(folder, _FILE, _new), None)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def key_of(pem: bytes) -> SSlibKey:
    """A public key as it was published; `BadInput` when it is none."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput("That is no public key in PEM form.", "Give the file that the issuer published.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise BadInput("That is not an Ed25519 key.", "Give the file that the issuer published.")
    return SSlibKey.from_crypto(key)


def sign(folder: Path, statement: dict[str, Any]) -> bytes:
    """A statement in its envelope; equal statements have equal bytes."""
    envelope = Envelope(canonical_json(statement), PAYLOAD_TYPE, {})
    envelope.sign(_signer(folder))
    return _written(envelope)


def opened(data: bytes, key: SSlibKey) -> dict[str, Any]:
    """The statement in an envelope; `Corrupt` unless this key signed it and each byte is as it was written, `BadInput`
    where it never was one."""
    try:
        envelope = Envelope.from_dict(json.loads(data))
        same = _written(envelope) == data
        statement = json.loads(envelope.payload)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, NotBase64) as error:
        if data[: len(_BEGINS)] != _BEGINS[: len(data)] and PAYLOAD_TYPE.encode() not in data:
            raise BadInput("That is no certificate.", "Give the certificate.dsse.json of a forget.") from error
        raise Corrupt("The certificate is damaged: it is no DSSE envelope any more.", _AGAIN) from error
    if not same or envelope.payload_type != PAYLOAD_TYPE or not isinstance(statement, dict):
        raise Corrupt("The certificate is not in the form in which it was written.", _AGAIN)
    try:
        envelope.verify([key], 1)
    except VerificationError as error:
        if key.keyid in envelope.signatures:
            raise Corrupt("The certificate was changed: its signature does not fit its contents.", _AGAIN) from error
        told = ", ".join(each[:12] for each in sorted(envelope.signatures)) or "nobody"
        raise Corrupt(
            f"The certificate is not signed by the key {key.keyid[:12]} (but by {told[:64]}).", _AGAIN
        ) from error
    return statement


_AGAIN = "Ask the issuer for it, and for the public key, again."


def _written(envelope: Envelope) -> bytes:
    return canonical_json(envelope.to_dict()) + b"\n"
