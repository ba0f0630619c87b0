"""Encryption at rest: pages leave this machine as AES-256-GCM, under a key that lies in a file of this user.

Used by the storage process, between the host pool and the backend; no backend knows of it.  A page is bound to the part
of its header that says what it is, so that nobody without the key can make a page, change one, or give one page's bytes
another page's name.  Nonces are random: one key is good for 2**32 pages.

Whoever may attach a store names the key file, and so may name any file of the server's user.  What is said of a file
that is no key tells its kind, owner and mode, and not a word of its content; the path is not repeated either, because a
key that was given in the path's place would then stand in the log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from typing import Any

from sglang_hicache.errors import StorageError
from sglang_hicache.private_file import NotPrivate, read_private_blocking
from sglang_hicache.storage.settings import EncryptionSettings

KEY_BYTES = 32

_NONCE_BYTES = 12

#: A file with more in it than any form of a key is none.
_MOST_FILE_BYTES = 128


class AesGcm:
    """A `page_format.Cipher`.  Keeps no state between calls, so both lanes may use it."""

    def __init__(self, key: bytes) -> None:
        from cryptography.exceptions import InvalidTag  # lazy door: 20 ms of start-up that only encryption may cost
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # lazy door: as above

        self._invalid_tag = InvalidTag
        self._cipher: Any = Cipher
        self._mode: Any = modes.GCM
        self._algorithm = algorithms.AES(key)
        digest = hashlib.blake2b(key, digest_size=4, person=b"hicache key id").digest()
        self.key_id = int.from_bytes(digest, "little") or 1

    def __repr__(self) -> str:
        return "<AesGcm>"

    def encrypt(self, payload: memoryview, bound: bytes, into: memoryview) -> tuple[bytes, bytes]:
        """Encrypt into other memory: the payload is a page that requests may be reading."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        encryptor = self._cipher(self._algorithm, self._mode(nonce)).encryptor()
        encryptor.authenticate_additional_data(bound)
        encryptor.update_into(payload, into)
        encryptor.finalize()
        return nonce, encryptor.tag

    def decrypt(self, payload: memoryview, bound: bytes, nonce: bytes, tag: bytes) -> bool:
        """Decrypt in place: the memory belongs to the read until it is answered."""
        decryptor = self._cipher(self._algorithm, self._mode(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(bound)
        decryptor.update_into(payload, payload)
        try:
            decryptor.finalize()
        except self._invalid_tag:
            return False
        return True


def open_cipher_blocking(settings: EncryptionSettings | None) -> AesGcm | None:
    """The cipher that an extra config asks for."""
    if settings is None:
        return None
    try:
        content = read_private_blocking(settings.key_file, _MOST_FILE_BYTES + 1)
    except NotPrivate as error:
        raise _refusal(str(error)) from None
    return AesGcm(_parse_key(content))


def _parse_key(content: bytes) -> bytes:
    """32 bytes as they are, in 64 hexadecimal digits, or in base64; a newline may follow the digits."""
    if len(content) == KEY_BYTES:
        return content
    text = content.strip() if len(content) <= _MOST_FILE_BYTES else b""
    for decode in (binascii.unhexlify, _from_base64):
        try:
            key = decode(text)
        except binascii.Error:
            continue
        if len(key) == KEY_BYTES:
            return key
    raise _refusal(f"holds no key; it must hold {KEY_BYTES} random bytes, or these in hexadecimal or base64")


def _from_base64(text: bytes) -> bytes:
    return base64.b64decode(text, validate=True)


def _refusal(complaint: str) -> StorageError:
    return StorageError(f"the file of extra config encryption.key_file {complaint}", "refused", "bad_config")
