"""Hash of tensors by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256

import torch
from torch import Tensor


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash the names, shapes, dtypes and values of tensors, as SHA-256 (hex).

    Example:
        >>> tensors_fingerprint({"bias": torch.zeros(2)}) == tensors_fingerprint({"bias": torch.zeros(1)})
        False
    """
    digest = sha256()
    for content in tensor_contents(tensors):
        digest.update(content)
    return digest.hexdigest()


def tensor_contents(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Yield the bytes of a hash; memory layout and device do not matter."""
    for name, tensor in tensors.items():
        yield f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode()
        content = tensor.detach().cpu().contiguous().reshape(-1)
        yield content.view(torch.uint8).numpy().tobytes() if content.numel() else b""
