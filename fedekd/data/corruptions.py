"""What a camera, a network link or a change of device does to images, at five levels (Hendrycks & Dietterich, 2019).

The corruptions are six of ImageNet-C's (arXiv 1903.12261). Their severities are those of its variant for small images,
CIFAR-10-C (32 x 32 pixels), where the table below does not say otherwise.
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

from fedekd.data.images import CHANNELS, MIN_SIZE
from fedekd.errors import UserError, nearest
from fedekd.seeding import derive_seed

LEVELS = (1, 2, 3, 4, 5)
"""How strong a corruption is, from hardly visible to strong."""

_AT_ONCE = 64  # images in double precision: 77 MB of 3 x 224 x 224 pixels
_REFERENCE_SIZE = 32  # pixels along a side of CIFAR-10-C's images


@dataclass(frozen=True)
class Corruption:
    """One way to corrupt images.

    Args:
        function: (pixels, severity, generator) -> pixels, both float64, shape (n, C, H, W), each image by itself.
            It is given whole numbers 0..255; what it returns is rounded and clipped to them. All that is random comes
            from the CPU generator, image after image.
        severities: What the function is given at each of `LEVELS`.
    """

    function: Callable[[Tensor, float, torch.Generator], Tensor]
    severities: tuple[float, float, float, float, float]


def corrupt(images: Tensor, name: str, level: int, seed: int = 0) -> Tensor:
    """Corrupt images, each by itself.

    All is computed in float64 and rounded to the nearest pixel value, so neither the device nor the size of the batch
    changes a result. The noise of image i depends on its position i, its shape, the seed and the level: the first
    images of a data set come out as they would without the rest.

    Args:
        images: Pixels 0..255, uint8, shape (N, C, H, W) with 1, 3 or 4 channels, at least 8 x 8 pixels; N may be 0.
        name: A name of `CORRUPTIONS`.
        level: One of `LEVELS`.
        seed: Seed of what is random; levels and corruptions draw independently.

    Returns:
        New images, uint8, of the same shape and on the same device.

    Raises:
        UserError: The name or the level is not known, or the corruption is not defined for so many channels.
        ValueError: The images are not as described above.

    Example:
        >>> images = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
        >>> corrupt(images, "brightness", level=1).unique()
        tensor([113], dtype=torch.uint8)
        >>> torch.equal(corrupt(images, "noise", level=5, seed=3), corrupt(images, "noise", level=5, seed=3))
        True
    """
    if name not in CORRUPTIONS:
        raise UserError(f"corruption is {name!r}, which is not known; {nearest(name, CORRUPTIONS)}")
    if level not in LEVELS:
        raise UserError(f"level is {level}, and must be one of {', '.join(map(str, LEVELS))}")
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 of shape (N, C, H, W), but are {images.dtype} of {tuple(images.shape)}")
    if images.shape[1] not in CHANNELS or min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"images must have 1, 3 or 4 channels and at least {MIN_SIZE} x {MIN_SIZE} pixels, "
            f"but have the shape {tuple(images.shape)}"
        )
    corruption = CORRUPTIONS[name]
    severity = corruption.severities[LEVELS.index(level)]
    generator = torch.Generator().manual_seed(derive_seed(seed, name, level))
    corrupted = torch.empty_like(images)
    for start in range(0, len(images), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        pixels = corruption.function(images[part].double(), severity, generator)
        corrupted[part] = pixels.round().clamp(0, 255).to(torch.uint8)
    return corrupted


def _noise(pixels: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise whose standard deviation is `severity` of the range, as of a sensor in low light."""
    # Image by image: a draw for all of them would depend on how many there are.
    noise = torch.stack([torch.randn(pixels.shape[1:], generator=generator, dtype=pixels.dtype) for _ in pixels])
    return pixels + 255 * severity * noise.to(pixels.device)


def _blur(pixels: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of `severity` pixels at 32 x 32, borders mirrored, as of a lens out of focus."""
    sigma = severity * max(1.0, min(pixels.shape[2:]) / _REFERENCE_SIZE)
    size = 2 * int(4 * sigma + 0.5) + 1  # cut at 4 sigma, as SciPy does
    # Rows, then columns: one kernel of both would take 57 x 57 products a pixel at 224 x 224.
    blurred: Tensor = gaussian_blur(gaussian_blur(pixels, [size, 1], [sigma, sigma]), [1, size], [sigma, sigma])
    return blurred


def _brightness(pixels: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Every pixel's value, of hue, saturation and value, raised by `severity` of the range, as of long exposure."""
    value = pixels.amax(dim=1, keepdim=True)
    raised = (value + 255 * severity).clamp_max(255)
    # Hue and saturation are ratios of channels, so they stay if all channels grow by one factor; black has neither.
    return torch.where(value > 0, pixels * raised / value.clamp_min(1), raised)


def _contrast(pixels: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Deviations from each channel's mean shrunk to `severity` of themselves, as of haze or weak light."""
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return mean + severity * (pixels - mean)


def _pixelate(pixels: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Means over cells, `severity` times as many along a side as there were pixels, as of a coarser sensor.

    The cells are disjoint and as equal in size as may be. The cells of a resampling filter, such as ImageNet-C's,
    overlap, and on small images a level of it can change less than the one below.
    """
    rows, columns = (
        torch.arange(length, device=pixels.device) * round(severity * length) // length for length in pixels.shape[2:]
    )
    in_row, in_column = (F.one_hot(cells).to(pixels) for cells in (rows, columns))
    sums = in_row.T @ pixels @ in_column  # of whole numbers, so exact
    means = sums / (in_row.sum(dim=0)[:, None] * in_column.sum(dim=0))
    return means[..., rows[:, None], columns]


def _jpeg(pixels: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Compressed to a JPEG of quality `severity` (1..100), colours at half resolution, as of a narrow link."""
    if pixels.shape[1] not in (1, 3):
        raise UserError(f"corruption is 'jpeg', but the images have {pixels.shape[1]} channels; JPEG knows 1 or 3")
    # Pillow's encoder gives the very bytes of torchvision's, which is to be removed.
    decoded = []
    for image in pixels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy():
        file = BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=int(severity))
        decoded.append(np.asarray(Image.open(file)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(pixels)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption(_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    # In proportion to the shorter side where that is longer than 32 pixels; on less than that as at 32.
    "blur": Corruption(_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    # Between CIFAR-10-C's 0.95 to 0.65, which 8 pixels cannot tell apart, and ImageNet-C's 0.6 to 0.25.
    "pixelate": Corruption(_pixelate, (0.9, 0.75, 0.6, 0.5, 0.35)),
    "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40)),
}
"""Corruptions by name. A new one is a function above and a row here."""
