"""Held-out images that are near-copies of training images.

`tests/data/test_near_copies.py` checks the bounds on digits and on random scans, several per patient (seed 0).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fedekd.data.client_splits import ClientSplits

#: Held-out images that are compared, over all clients.
MAX_CHECKED = 500

#: A near-copy is closer than this share of the distance to the 30th nearest training image, or than the second share
#: of that to training images taken at regular steps.
NEAREST_RATIO, TYPICAL_RATIO = 0.15, 0.06

#: Clients above this share of near-copies are reported, from 5 near-copies on; without any, all clients together.
MAX_SHARE, MIN_COPIES = 0.1, 5

_THUMBNAIL, _WORKING_SIZE = 8, 28
_NEAREST, _RANK, _TYPICAL = 10, 30, 10
_ROWS = 128  # images at a time


class NearCopies(NamedTuple):
    """Near-copies among the held-out images of one client.

    Attributes:
        client: Number of the client.
        copies: Compared images that are near-copies of a training image of the client.
        checked: Compared images of validation and test.
    """

    client: int
    copies: int
    checked: int


def find_near_copies(
    pixels: Tensor, clients: Iterable[ClientSplits], max_checked: int = MAX_CHECKED
) -> list[NearCopies]:
    """Compare held-out images with the training images of the same client.

    An 8x8 grey thumbnail, without its mean and that of the data set, selects the nearest training images. They are
    compared at about 28x28 pixels, shifted by up to 2 pixels, independently of brightness and contrast.

    Args:
        pixels: All images, uint8, shape (N, C, H, W).
        clients: Indices of each client's samples.
        max_checked: Held-out images that are compared, taken at regular steps; at least 1 per client.

    Returns:
        One row per client with training and held-out images.
    """
    held_out = [(splits, torch.cat([splits.validation, splits.test])) for splits in clients]
    share = min(1.0, max_checked / max(1, sum(len(indices) for _, indices in held_out)))
    rows = []
    # A view, at most twice the working size: 3,072 whole images of 512x512 in colour are 2.4 GB.
    step = max(1, min(pixels.shape[2:]) // _WORKING_SIZE)
    pixels = pixels[:, :, ::step, ::step]
    thumbnails = _thumbnails(pixels)
    for splits, indices in held_out:
        if len(indices) and len(splits.train):
            checked = _at_steps(indices, max(1, round(share * len(indices))))
            parts = [_are_copies(pixels, thumbnails, part, splits.train) for part in torch.split(checked, _ROWS)]
            rows.append(NearCopies(splits.client, int(torch.cat(parts).sum()), len(checked)))
    return rows


def near_copy_warning(
    found: Iterable[NearCopies], clients: Iterable[ClientSplits] = (), has_groups: bool = False
) -> str | None:
    """Return one line on the clients with many near-copies; None without any.

    Args:
        found: Near-copies of each client.
        clients: The clients, which may be sites with names. Default: clients have numbers.
        has_groups: No group is in two splits already.
    """
    sites = {splits.client: repr(splits.name) for splits in clients if splits.name is not None}
    found = list(found)
    many = [row for row in found if _has_many(row.copies, row.checked)]
    if not many:  # with some hundred clients only a few images of each are compared
        if not _has_many(sum(row.copies for row in found), sum(row.checked for row in found)):
            return None
        many = found
    copies, checked = sum(row.copies for row in many), sum(row.checked for row in many)
    named = [sites.get(row.client, str(row.client)) for row in many if row.copies]
    names = ", ".join(named[:10]) + (", ..." if len(named) > 10 else "")
    return (
        f"data.dataset: {copies} of {checked} compared validation and test images are near-copies of training images of"
        f" the same client ({'sites' if sites else 'clients'} {names}); their scores are too high. "
        + (
            "They are in different groups: remove the copies, or correct the groups"
            if has_groups
            else "Keep all images of a patient in one split by --data.group_column, or remove the copies"
        )
    )


def _has_many(copies: int, checked: int) -> bool:
    return copies >= max(MIN_COPIES, MAX_SHARE * checked)


def _are_copies(pixels: Tensor, thumbnails: Tensor, held_out: Tensor, train: Tensor) -> Tensor:
    """Return which of the held-out images, shape (n,), are near-copies."""
    similarity = thumbnails[held_out] @ thumbnails[train].T
    ranked = train[similarity.topk(min(_RANK, len(train))).indices]
    nearest = torch.cat([ranked[:, :_NEAREST], ranked[:, _NEAREST:][:, -4:]], dim=1)
    typical = _at_steps(train, _TYPICAL).expand(len(held_out), -1)
    others = torch.cat([nearest, typical], dim=1)
    images = _grey(pixels[held_out])
    compared = _grey(pixels[others.flatten()]).reshape(*others.shape, *images.shape[1:])
    distances = _aligned_distances(images, compared)
    neighbours, typical_distance = distances[:, : nearest.shape[1]], distances[:, nearest.shape[1] :].median(1).values
    closest, farthest = neighbours.min(1).values, neighbours.max(1).values
    return (closest <= NEAREST_RATIO * farthest) | (closest <= TYPICAL_RATIO * typical_distance)


def _aligned_distances(images: Tensor, others: Tensor) -> Tensor:
    """Return the smallest distance over all shifts of an image, shape (n, k).

    Args:
        images: Grey images, shape (n, H, W).
        others: Images to compare each with, shape (n, k, H, W).
    """
    # Averages of 2x2 pixels halve the noise.
    images, others = (F.avg_pool2d(part, 2, stride=1) for part in (images, others))
    height, width = images.shape[1:]
    shift = max(1, min(height + 1, width + 1) // 14)
    rows, columns = height - 2 * shift, width - 2 * shift
    centre = _standardised(others[:, :, shift : shift + rows, shift : shift + columns].flatten(2))
    best = torch.full(others.shape[:2], -1.0)
    for row in range(2 * shift + 1):
        for column in range(2 * shift + 1):
            moved = _standardised(images[:, row : row + rows, column : column + columns].flatten(1))
            torch.maximum(best, (centre @ moved[:, :, None])[:, :, 0], out=best)
    return (2 - 2 * best).clamp_min(0).sqrt()


def _thumbnails(pixels: Tensor) -> Tensor:
    """Return a unit vector per image, shape (N, 64)."""
    parts = [F.adaptive_avg_pool2d(_grey(part), _THUMBNAIL).flatten(1) for part in torch.split(pixels, 4096)]
    thumbnails = torch.cat(parts)
    return _standardised(thumbnails - thumbnails.mean(0))


def _grey(pixels: Tensor) -> Tensor:
    return pixels.float().mean(1)


def _standardised(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(-1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return centred.div_(norms.clamp_min_(1e-6))


def _at_steps(indices: Tensor, count: int) -> Tensor:
    """Return at most `count` indices at regular steps."""
    return indices[torch.linspace(0, len(indices) - 1, min(count, len(indices))).long()]
