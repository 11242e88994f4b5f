"""Encryption at rest: AES-256-GCM (NIST SP 800-38D), with keys that can be changed one after the other."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES, TAG_BYTES = 12, 16
_KEY_BYTES = 32


class UnknownKeyError(Exception):
    """What was read was written with a key that we do not have."""


class TamperedError(Exception):
    """What was read is not what was written with the key of that id."""


class KeyRing:
    """Keys by their ids. The first one encrypts, each decrypts what names it: to change keys, put a new one in front,
    and take the old one out once nothing needs it.

    Nonces are random, 96 bits: good for 2³² chunks a key.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """Raises:
        ValueError: there is none, or one is not of 32 bytes.
        """
        if not keys:
            raise ValueError("no encryption key")
        if wrong := [name for name, key in keys.items() if len(key) != _KEY_BYTES]:
            raise ValueError(f"the encryption keys {', '.join(wrong)} are not of {_KEY_BYTES} bytes")
        self.current = next(iter(keys))
        self._ciphers = {name: AESGCM(key) for name, key in keys.items()}

    @classmethod
    def parse(cls, text: str, source: str) -> KeyRing:
        """Lines ``id:key``, the key in base64; empty lines and what follows a # do not count.

        Raises:
            ValueError: a line is not so. No message holds a key.
        """
        keys: dict[str, bytes] = {}
        for number, line in enumerate(text.replace(",", "\n").splitlines(), 1):
            name, colon, key = (part.strip() for part in line.partition("#")[0].partition(":"))
            if not (name or colon):
                continue
            try:
                keys[name] = base64.b64decode(key, validate=True)
            except binascii.Error:
                raise ValueError(f"{source}, line {number}: must be id:key, the key in base64") from None
            if not colon or not name or len(name) > 64:
                raise ValueError(f"{source}, line {number}: must be id:key, the key in base64")
        try:
            return cls(keys)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Raises:
        ValueError: it cannot be read, is readable for others, or holds no keys.
        """
        try:
            if path.stat().st_mode & 0o077:
                raise ValueError(f"{path}: others may read it; chmod 600")
            return cls.parse(path.read_text(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: the encryption keys cannot be read: {error}") from error

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._ciphers

    def encrypt(self, data: memoryview | bytes, nonce: bytes, sealed: bytes) -> bytes:
        """``data`` with the current key, :data:`TAG_BYTES` longer; ``sealed`` is vouched for and not kept."""
        return self._ciphers[self.current].encrypt(nonce, data, sealed)

    def decrypt(self, key_id: str, data: memoryview | bytes, nonce: bytes, sealed: bytes) -> bytes:
        """Raises:
        UnknownKeyError: the key is not here.
        TamperedError: it has been changed, or the key of that id was another one then.
        """
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise UnknownKeyError(f"no key {key_id!r}")
        try:
            return cipher.decrypt(nonce, data, sealed)
        except (InvalidTag, ValueError) as error:
            raise TamperedError("it was not written with this key, or has been changed") from error


def new_nonce() -> bytes:
    return os.urandom(NONCE_BYTES)
