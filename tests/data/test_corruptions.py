"""Corruptions equal slow literal implementations, and grow with the magnitude."""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from fedekd.data import CORRUPTIONS, SEVERITIES, Corruption, corrupt, scale
from fedekd.errors import UserError
from fedekd.seeding import derive_seed

Pixels = npt.NDArray[np.float64]

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)
every_severity = pytest.mark.parametrize("severity", SEVERITIES)


def digits(size: int) -> Tensor:
    images = torch.from_numpy(load_digits().images[:80])[:, None] * (255 / 16)
    return F.interpolate(images, size=(size, size), mode="bilinear").to(torch.uint8)


def smooth(channels: int, height: int, width: int, n: int = 80) -> Tensor:
    coarse = torch.rand(n, channels, 5, 5, generator=torch.Generator().manual_seed(channels + height))
    return (255 * F.interpolate(coarse, size=(height, width), mode="bilinear")).to(torch.uint8)


def change(images: Tensor, name: str, severity: int) -> float:
    return (corrupt(images, name, severity).double() - images.double()).abs().mean().item()


def literal_blur(image: Pixels, magnitude: float) -> Pixels:
    sigma = magnitude * max(1, min(image.shape[1:]) / 32)
    return np.stack([gaussian_filter(channel, sigma, mode="mirror", truncate=4) for channel in image])


def literal_brightness(image: Pixels, magnitude: float) -> Pixels:
    changed = image.copy()
    for y, x in np.ndindex(*image.shape[1:]):
        if len(image) == 1:
            changed[0, y, x] = image[0, y, x] + 255 * magnitude
            continue
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x] / 255)
        changed[:, y, x] = np.multiply(255, colorsys.hsv_to_rgb(hue, saturation, min(value + magnitude, 1)))
    return changed


def literal_contrast(image: Pixels, magnitude: float) -> Pixels:
    means = image.mean(axis=(1, 2), keepdims=True)
    return (image - means) * magnitude + means


def literal_pixelate(image: Pixels, magnitude: float) -> Pixels:
    height, width = image.shape[1:]
    rows, columns = round(magnitude * height), round(magnitude * width)
    changed = image.copy()
    for channel, y, x in np.ndindex(*image.shape):
        cell = [
            image[channel, i, j]
            for i in range(height)
            for j in range(width)
            if i * rows // height == y * rows // height and j * columns // width == x * columns // width
        ]
        changed[channel, y, x] = np.mean(cell)
    return changed


def torchvision_jpeg(image: Pixels, magnitude: float) -> Pixels:
    from torchvision.io import decode_jpeg, encode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their removal from torchvision
        encoded = encode_jpeg(torch.from_numpy(image).to(torch.uint8), quality=int(magnitude))
        return decode_jpeg(encoded).double().numpy()


LITERAL = {
    "blur": literal_blur,
    "brightness": literal_brightness,
    "contrast": literal_contrast,
    "pixelate": literal_pixelate,
    "jpeg": torchvision_jpeg,
}


def test_every_corruption_but_noise_has_a_literal_implementation() -> None:
    assert set(LITERAL) | {"gaussian_noise"} == set(CORRUPTIONS)


@pytest.mark.parametrize(("name", "literal"), LITERAL.items(), ids=LITERAL)
@pytest.mark.parametrize(
    ("severity", "shape"),  # the loops are slow: two severities at the largest size
    [*product(SEVERITIES, [(1, 8, 9), (3, 13, 8)]), (1, (3, 40, 48)), (5, (3, 40, 48))],
)
def test_corrupt_equals_literal_implementation(
    name: str, literal: Callable[[Pixels, float], Pixels], severity: int, shape: tuple[int, int, int]
) -> None:
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(severity), dtype=torch.uint8)
    image[:, 0, 0], image[:, 0, 1] = 0, 255
    expected = literal(image.double().numpy(), CORRUPTIONS[name].magnitudes[severity - 1])
    corrupted = corrupt(image[None], name, severity)[0]
    # Rounded; a value halfway between two may go either way.
    assert np.abs(corrupted.numpy() - expected.clip(0, 255)).max() < 0.5 + 1e-9


@every_severity
def test_gaussian_noise_has_expected_moments(severity: int) -> None:
    grey = torch.full((70, 3, 32, 32), 128, dtype=torch.uint8)
    noise = corrupt(grey, "gaussian_noise", severity).double() - 128
    magnitude = CORRUPTIONS["gaussian_noise"].magnitudes[severity - 1]
    # 215,040 draws: four standard errors; rounding adds the variance 1/12.
    assert noise.std().item() == pytest.approx(
        (255**2 * magnitude**2 + 1 / 12) ** 0.5, rel=4 / (2 * noise.numel()) ** 0.5
    )
    assert abs(noise.mean().item()) < 4 * 255 * magnitude / noise.numel() ** 0.5
    assert (noise**4).mean().item() / noise.var().item() ** 2 == pytest.approx(3, abs=0.05)
    rows = noise.flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.1  # images have independent noise


def test_gaussian_noise_is_clipped() -> None:
    white, black = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8), torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    assert corrupt(white, "gaussian_noise", 5).min() > 100
    assert corrupt(black, "gaussian_noise", 5).max() < 155


@every_corruption
@pytest.mark.parametrize(
    "images",
    [digits(8), digits(28), smooth(3, 32, 32), smooth(3, 64, 48), smooth(1, 8, 17)],
    ids=["digits8", "digits28", "rgb32", "rgb64x48", "grey8x17"],
)
def test_corrupt_higher_severity_changes_more(name: str, images: Tensor) -> None:
    changes = [change(images, name, severity) for severity in SEVERITIES]
    assert changes[0] > 0
    assert all(mild < strong for mild, strong in pairwise(changes)), changes


def test_pixelate_has_fewer_cells_at_higher_severity() -> None:
    for size in range(8, 65):
        cells = [round(magnitude * size) for magnitude in CORRUPTIONS["pixelate"].magnitudes]
        assert [size, *cells] == sorted({size, *cells}, reverse=True), size


def test_pixelate_divisible_size_equals_resampling() -> None:
    images = smooth(3, 32, 24, n=4)
    half = F.interpolate(images.double(), scale_factor=0.5, mode="area")
    assert CORRUPTIONS["pixelate"].magnitudes[3] == 0.5
    expected = F.interpolate(half, scale_factor=2.0, mode="nearest").round().to(torch.uint8)
    assert torch.equal(corrupt(images, "pixelate", 4), expected)


@every_corruption
@given(data=st.data())
def test_corrupt_keeps_shape_and_input(name: str, data: st.DataObject) -> None:
    severity = data.draw(st.sampled_from(SEVERITIES))
    channels = data.draw(st.sampled_from([1, 3] if name == "jpeg" else [1, 3, 4]))
    n, height, width = data.draw(st.tuples(st.integers(0, 3), st.integers(8, 20), st.integers(8, 20)))
    constant = data.draw(st.sampled_from([None, 0, 255]))
    images = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)
    if constant is not None:
        images.fill_(constant)
    before = images.clone()
    corrupted = corrupt(images, name, severity, seed=data.draw(st.integers(-5, 5)))
    assert corrupted.dtype == torch.uint8
    assert corrupted.shape == images.shape
    assert torch.equal(images, before)
    assert n == 0 or corrupted.data_ptr() != images.data_ptr()


@every_corruption
def test_corrupt_first_images_do_not_depend_on_the_rest(name: str) -> None:
    images = smooth(3, 9, 9, n=150)  # over two chunks; 243 pixels are no multiple of 16, torch.randn's own chunk
    corrupted = corrupt(images, name, 3, seed=7)
    for n in (1, 63, 64, 65, 149):
        assert torch.equal(corrupt(images[:n], name, 3, seed=7), corrupted[:n])
    if name != "gaussian_noise":
        assert torch.equal(corrupt(images.flip(0), name, 3).flip(0), corrupted)


@every_corruption
def test_corrupt_ignores_memory_layout(name: str) -> None:
    images = smooth(3, 12, 10, n=5)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(corrupt(strided, name, 4), corrupt(images, name, 4))


def test_gaussian_noise_depends_on_seed_and_severity_only() -> None:
    grey = torch.full((2, 1, 16, 16), 128, dtype=torch.uint8)
    state = torch.get_rng_state()
    first = corrupt(grey, "gaussian_noise", 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(corrupt(grey, "gaussian_noise", 1), first)
    assert not torch.equal(corrupt(grey, "gaussian_noise", 1, seed=1), first)
    assert not torch.equal(first[0], first[1])
    one, two = (corrupt(grey, "gaussian_noise", severity).double().flatten() - 128 for severity in (1, 2))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.2


def test_gaussian_noise_keeps_the_numbers_of_its_former_name() -> None:
    grey = torch.full((1, 1, 8, 8), 128, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(derive_seed(3, "noise", 2))
    expected = 128 + 255 * 0.06 * torch.randn(1, 8, 8, generator=generator, dtype=torch.float64)
    assert torch.equal(corrupt(grey, "gaussian_noise", 2, seed=3)[0], expected.round().to(torch.uint8))


def test_other_corruptions_ignore_the_seed() -> None:
    images = smooth(3, 16, 16, n=2)
    for name in LITERAL:
        assert torch.equal(corrupt(images, name, 2, seed=1), corrupt(images, name, 2, seed=2))


def test_new_corruption_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    invert = Corruption(lambda pixels, magnitude, generator: 255 * magnitude - pixels, (0.1, 0.2, 0.3, 0.4, 1.0))
    monkeypatch.setitem(CORRUPTIONS, "invert", invert)
    images = smooth(1, 8, 8, n=2)
    assert torch.equal(corrupt(images, "invert", 5), 255 - images)
    assert (corrupt(images, "invert", 1) <= 26).all()


def test_corrupt_invalid_option_raises_user_error() -> None:
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"corruption: expected one of .*, got 'jpg'. Did you mean 'jpeg'\?"):
        corrupt(images, "jpg", 1)
    for severity in (0, 6, -1):
        with pytest.raises(UserError, match=f"severity: expected one of 1, 2, 3, 4, 5, got {severity}"):
            corrupt(images, "blur", severity)
    with pytest.raises(UserError, match="'jpeg' expects images with 1 or 3 channels, got 4"):
        corrupt(images.repeat(1, 4, 1, 1), "jpeg", 1)


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 3, 8, 8, 8), (1, 2, 8, 8), (1, 1, 1, 1), (1, 3, 8, 7)])
def test_corrupt_invalid_shape_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images: expected"):
        corrupt(torch.zeros(shape, dtype=torch.uint8), "blur", 1)


def test_corrupt_float_images_equal_those_of_256_values() -> None:
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = corrupt(scale(images) + 1e-4, "gaussian_noise", 2, seed=1)
    assert found.dtype == torch.float32
    assert torch.equal(found, scale(corrupt(images, "gaussian_noise", 2, seed=1)))
