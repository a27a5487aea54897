"""Image corruptions of ImageNet-C and CIFAR-10-C at severities 1 to 5.

Six of the corruptions of Hendrycks and Dietterich (2019, arXiv 1903.12261). Unless the table below states otherwise,
the magnitudes are those of CIFAR-10-C, for images of 32 x 32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from fedekd.data.batches import scale
from fedekd.data.pixels import CHANNELS, MIN_SIZE
from fedekd.errors import UserError, require_choice
from fedekd.seeding import derive_seed

SEVERITIES = (1, 2, 3, 4, 5)
"""Severities of a corruption, from hardly visible to strong."""

_CHUNK = 64  # images in float64: 77 MB of 3 x 224 x 224 pixels
_REFERENCE_SIZE = 32  # side of CIFAR-10-C's images in pixels


@dataclass(frozen=True)
class Corruption:
    """One row of `CORRUPTIONS`.

    Args:
        function: `(pixels, magnitude, generator) -> pixels`, both float64, shape (n, C, H, W), image by image. Input
            values are whole numbers 0..255; the result is rounded and clipped to them. Random numbers come from the
            CPU generator, one image after the other.
        magnitudes: The second argument of the function at each of `SEVERITIES`.
        seed_name: Name from which the seed is derived; empty (default) for the name of the corruption.
    """

    function: Callable[[Tensor, float, torch.Generator], Tensor]
    magnitudes: tuple[float, float, float, float, float]
    seed_name: str = ""


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Return corrupted copies of images.

    Computed in float64 and rounded to the nearest pixel value: neither the device nor the number of images changes a
    result. The noise of image i depends on i, its shape, the seed and the severity only.

    Args:
        images: Pixels 0..255, uint8, shape (N, C, H, W) with 1, 3 or 4 channels, at least 8 x 8 pixels; N may be 0. Or
            float pixels in [-1, 1], which are first rounded to 256 values.
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Seed of the random numbers; severities and corruptions draw independently. Default 0.

    Returns:
        New images of the same type and shape, on the same device.

    Raises:
        UserError: If the name or the severity is unknown, or the corruption is not defined for the number of channels.
        ValueError: If the images are not as described above.

    Reference:
        Hendrycks and Dietterich (arXiv 1903.12261), Section 3.

    Example:
        >>> images = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
        >>> corrupt(images, "brightness", severity=1).unique()
        tensor([113], dtype=torch.uint8)
    """
    require_choice("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"severity: expected one of {', '.join(map(str, SEVERITIES))}, got {severity}")
    if images.is_floating_point():
        pixels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return scale(corrupt(pixels, name, severity, seed)).to(images.dtype)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: expected uint8 of shape (N, C, H, W), got {images.dtype} of {tuple(images.shape)}")
    if images.shape[1] not in CHANNELS or min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"images: expected 1, 3 or 4 channels and at least {MIN_SIZE} x {MIN_SIZE} pixels, "
            f"got shape {tuple(images.shape)}"
        )
    corruption = CORRUPTIONS[name]
    magnitude = corruption.magnitudes[SEVERITIES.index(severity)]
    generator = torch.Generator().manual_seed(derive_seed(seed, corruption.seed_name or name, severity))
    corrupted = torch.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        pixels = corruption.function(images[part].double(), magnitude, generator)
        corrupted[part] = pixels.round().clamp(0, 255).to(torch.uint8)
    return corrupted


def _gaussian_noise(pixels: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise; `magnitude` is its standard deviation per range."""
    # Drawn image by image: one draw for all would depend on the number of images.
    noise = torch.stack([torch.randn(pixels.shape[1:], generator=generator, dtype=pixels.dtype) for _ in pixels])
    return pixels + 255 * magnitude * noise.to(pixels.device)


def _blur(pixels: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of `magnitude` pixels at 32 x 32, with mirrored borders."""
    sigma = magnitude * max(1.0, min(pixels.shape[2:]) / _REFERENCE_SIZE)
    size = 2 * int(4 * sigma + 0.5) + 1  # truncated at 4 sigma, as in SciPy
    # Rows, then columns: a 2D kernel needs 57 x 57 products per pixel at 224 x 224.
    blurred: Tensor = gaussian_blur(gaussian_blur(pixels, [size, 1], [sigma, sigma]), [1, size], [sigma, sigma])
    return blurred


def _brightness(pixels: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Raise the value channel of HSV by `magnitude` of the range."""
    value = pixels.amax(dim=1, keepdim=True)
    raised = (value + 255 * magnitude).clamp_max(255)
    # One factor for all channels keeps hue and saturation, which are ratios; black has neither.
    return torch.where(value > 0, pixels * raised / value.clamp_min(1), raised)


def _contrast(pixels: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Scale deviations from the mean of each channel by `magnitude`."""
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return mean + magnitude * (pixels - mean)


def _pixelate(pixels: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Average over cells, `magnitude` times as many per side as pixels.

    Cells are disjoint and differ in size by at most one pixel per side. ImageNet-C's resampling filter has overlapping
    cells; on small images one of its severities can change an image less than the severity below.
    """
    rows, columns = (
        torch.arange(length, device=pixels.device) * round(magnitude * length) // length for length in pixels.shape[2:]
    )
    in_row, in_column = (F.one_hot(cells).to(pixels) for cells in (rows, columns))
    sums = in_row.T @ pixels @ in_column  # exact: whole numbers
    means = sums / (in_row.sum(dim=0)[:, None] * in_column.sum(dim=0))
    return means[..., rows[:, None], columns]


def _jpeg(pixels: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Compress to JPEG of quality `magnitude` (1..100), chroma subsampled."""
    if pixels.shape[1] not in (1, 3):
        raise UserError(f"corruption: 'jpeg' expects images with 1 or 3 channels, got {pixels.shape[1]}")
    # Pillow's encoder: same bytes as torchvision's encode_jpeg, which is deprecated.
    decoded = []
    for image in pixels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy():
        file = BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=int(magnitude))
        decoded.append(np.asarray(Image.open(file)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(pixels)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), seed_name="noise"),
    # Scaled with the shorter side from 32 pixels on; smaller images are blurred as at 32.
    "blur": Corruption(_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    # Between CIFAR-10-C's 0.95 to 0.65, which are equal at 8 pixels, and ImageNet-C's 0.6 to 0.25.
    "pixelate": Corruption(_pixelate, (0.9, 0.75, 0.6, 0.5, 0.35)),
    "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40)),
}
"""Corruptions by name. A new corruption is one function and one row."""
