"""Hashes of pixels: which images are bit-identical, and one hash of a whole set that any file
format shares.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def image_hashes(images: Tensor) -> Tensor:
    """A 64-bit hash of each uint8 image [B, 3, H, W], int64 [B]."""
    pixels = images.cpu().contiguous().numpy()
    salt = repr(tuple(images.shape[1:])).encode()
    digests = [
        hashlib.blake2b(image.tobytes(), digest_size=8, key=salt).digest() for image in pixels
    ]
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())


def set_hash(hashes: Tensor) -> str:
    """16 hexadecimal digits for a set of images with the given hashes [N], whatever their order."""
    return hashlib.sha256(np.sort(hashes.numpy()).tobytes()).hexdigest()[:16]


def array_hash(arrays: Iterable[np.ndarray]) -> str:
    """16 hexadecimal digits for the values of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
