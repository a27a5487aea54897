"""Corruptions against slow literal references, and that a level means more damage than the one below."""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Callable
from itertools import pairwise

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

from fedekd.data import CORRUPTIONS, LEVELS, Corruption, corrupt
from fedekd.errors import UserError

Pixels = npt.NDArray[np.float64]

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)
every_level = pytest.mark.parametrize("level", LEVELS)


def digits(size: int) -> Tensor:
    images = torch.from_numpy(load_digits().images[:80])[:, None] * (255 / 16)
    return F.interpolate(images, size=(size, size), mode="bilinear").to(torch.uint8)


def smooth(channels: int, height: int, width: int, n: int = 80) -> Tensor:
    coarse = torch.rand(n, channels, 5, 5, generator=torch.Generator().manual_seed(channels + height))
    return (255 * F.interpolate(coarse, size=(height, width), mode="bilinear")).to(torch.uint8)


def change(images: Tensor, name: str, level: int) -> float:
    return (corrupt(images, name, level).double() - images.double()).abs().mean().item()


def literal_blur(image: Pixels, severity: float) -> Pixels:
    sigma = severity * max(1, min(image.shape[1:]) / 32)
    return np.stack([gaussian_filter(channel, sigma, mode="mirror", truncate=4) for channel in image])


def literal_brightness(image: Pixels, severity: float) -> Pixels:
    changed = image.copy()
    for y, x in np.ndindex(*image.shape[1:]):
        if len(image) == 1:
            changed[0, y, x] = image[0, y, x] + 255 * severity
            continue
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x] / 255)
        changed[:, y, x] = np.multiply(255, colorsys.hsv_to_rgb(hue, saturation, min(value + severity, 1)))
    return changed


def literal_contrast(image: Pixels, severity: float) -> Pixels:
    means = image.mean(axis=(1, 2), keepdims=True)
    return (image - means) * severity + means


def literal_pixelate(image: Pixels, severity: float) -> Pixels:
    height, width = image.shape[1:]
    rows, columns = round(severity * height), round(severity * width)
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


def torchvision_jpeg(image: Pixels, severity: float) -> Pixels:
    from torchvision.io import decode_jpeg, encode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their removal from torchvision
        encoded = encode_jpeg(torch.from_numpy(image).to(torch.uint8), quality=int(severity))
        return decode_jpeg(encoded).double().numpy()


LITERAL = {
    "blur": literal_blur,
    "brightness": literal_brightness,
    "contrast": literal_contrast,
    "pixelate": literal_pixelate,
    "jpeg": torchvision_jpeg,
}


def test_all_but_the_noise_have_a_reference() -> None:
    assert set(LITERAL) | {"noise"} == set(CORRUPTIONS)


@pytest.mark.parametrize(("name", "literal"), LITERAL.items(), ids=LITERAL)
@every_level
@pytest.mark.parametrize("shape", [(1, 8, 9), (3, 13, 8), (3, 40, 48)])
def test_equal_the_literal_reference(
    name: str, literal: Callable[[Pixels, float], Pixels], level: int, shape: tuple[int, int, int]
) -> None:
    if shape[1] == 40 and level not in (1, 5):
        return  # the slow loops need not see each level at that size
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(level), dtype=torch.uint8)
    image[:, 0, 0], image[:, 0, 1] = 0, 255
    expected = literal(image.double().numpy(), CORRUPTIONS[name].severities[level - 1])
    corrupted = corrupt(image[None], name, level)[0]
    # A nearest whole number; halfway between two, either will do.
    assert np.abs(corrupted.numpy() - expected.clip(0, 255)).max() < 0.5 + 1e-9


@every_level
def test_noise_is_gaussian_around_the_image(level: int) -> None:
    grey = torch.full((70, 3, 32, 32), 128, dtype=torch.uint8)
    noise = corrupt(grey, "noise", level).double() - 128
    severity = CORRUPTIONS["noise"].severities[level - 1]
    # 215,040 draws: four standard errors; rounding adds the variance 1/12.
    assert noise.std().item() == pytest.approx(
        (255**2 * severity**2 + 1 / 12) ** 0.5, rel=4 / (2 * noise.numel()) ** 0.5
    )
    assert abs(noise.mean().item()) < 4 * 255 * severity / noise.numel() ** 0.5
    assert (noise**4).mean().item() / noise.var().item() ** 2 == pytest.approx(3, abs=0.05)
    rows = noise.flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.1  # no image is given another's noise


def test_noise_is_clipped_and_not_wrapped() -> None:
    white, black = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8), torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    assert corrupt(white, "noise", 5).min() > 100
    assert corrupt(black, "noise", 5).max() < 155


@every_corruption
@pytest.mark.parametrize(
    "images",
    [digits(8), digits(28), smooth(3, 32, 32), smooth(3, 64, 48), smooth(1, 8, 17)],
    ids=["digits8", "digits28", "rgb32", "rgb64x48", "grey8x17"],
)
def test_a_higher_level_changes_more(name: str, images: Tensor) -> None:
    changes = [change(images, name, level) for level in LEVELS]
    assert changes[0] > 0
    assert all(mild < strong for mild, strong in pairwise(changes)), changes


@pytest.mark.parametrize("size", range(8, 65))
def test_pixelate_has_fewer_cells_at_each_level(size: int) -> None:
    cells = [round(severity * size) for severity in CORRUPTIONS["pixelate"].severities]
    assert [size, *cells] == sorted({size, *cells}, reverse=True)


def test_pixelate_is_what_resampling_gives_where_cells_fit() -> None:
    images = smooth(3, 32, 24, n=4)
    half = F.interpolate(images.double(), scale_factor=0.5, mode="area")
    assert CORRUPTIONS["pixelate"].severities[3] == 0.5
    expected = F.interpolate(half, scale_factor=2.0, mode="nearest").round().to(torch.uint8)
    assert torch.equal(corrupt(images, "pixelate", 4), expected)


@every_corruption
@every_level
@given(data=st.data())
def test_shape_and_input_are_kept_whatever_the_image(name: str, level: int, data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([1, 3] if name == "jpeg" else [1, 3, 4]))
    n, height, width = data.draw(st.tuples(st.integers(0, 3), st.integers(8, 20), st.integers(8, 20)))
    constant = data.draw(st.sampled_from([None, 0, 255]))
    images = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)
    if constant is not None:
        images.fill_(constant)
    before = images.clone()
    corrupted = corrupt(images, name, level, seed=data.draw(st.integers(-5, 5)))
    assert corrupted.dtype == torch.uint8
    assert corrupted.shape == images.shape
    assert torch.equal(images, before)
    assert n == 0 or corrupted.data_ptr() != images.data_ptr()


@every_corruption
def test_the_first_images_come_out_as_without_the_rest(name: str) -> None:
    images = smooth(3, 9, 9, n=150)  # over two chunks; 243 pixels are no multiple of 16, torch.randn's own chunk
    corrupted = corrupt(images, name, 3, seed=7)
    for n in (1, 63, 64, 65, 149):
        assert torch.equal(corrupt(images[:n], name, 3, seed=7), corrupted[:n])
    if name != "noise":
        assert torch.equal(corrupt(images.flip(0), name, 3).flip(0), corrupted)


@every_corruption
def test_layout_in_memory_does_not_matter(name: str) -> None:
    images = smooth(3, 12, 10, n=5)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(corrupt(strided, name, 4), corrupt(images, name, 4))


def test_seed_and_level_give_other_noise_and_nothing_else_does() -> None:
    grey = torch.full((2, 1, 16, 16), 128, dtype=torch.uint8)
    state = torch.get_rng_state()
    first = corrupt(grey, "noise", 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(corrupt(grey, "noise", 1), first)
    assert not torch.equal(corrupt(grey, "noise", 1, seed=1), first)
    assert not torch.equal(first[0], first[1])
    one, two = (corrupt(grey, "noise", level).double().flatten() - 128 for level in (1, 2))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.2


def test_all_but_the_noise_ignore_the_seed() -> None:
    images = smooth(3, 16, 16, n=2)
    for name in LITERAL:
        assert torch.equal(corrupt(images, name, 2, seed=1), corrupt(images, name, 2, seed=2))


def test_a_new_corruption_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    invert = Corruption(lambda pixels, severity, generator: 255 * severity - pixels, (0.1, 0.2, 0.3, 0.4, 1.0))
    monkeypatch.setitem(CORRUPTIONS, "invert", invert)
    images = smooth(1, 8, 8, n=2)
    assert torch.equal(corrupt(images, "invert", 5), 255 - images)
    assert (corrupt(images, "invert", 1) <= 26).all()


def test_users_mistakes_are_named() -> None:
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"corruption is 'jpg', which is not known; did you mean 'jpeg'\?"):
        corrupt(images, "jpg", 1)
    for level in (0, 6, -1):
        with pytest.raises(UserError, match=f"level is {level}, and must be one of 1, 2, 3, 4, 5"):
            corrupt(images, "blur", level)
    with pytest.raises(UserError, match="corruption is 'jpeg', but the images have 4 channels"):
        corrupt(images.repeat(1, 4, 1, 1), "jpeg", 1)


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 3, 8, 8, 8), (1, 2, 8, 8), (1, 1, 1, 1), (1, 3, 8, 7)])
def test_images_that_are_none_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must"):
        corrupt(torch.zeros(shape, dtype=torch.uint8), "blur", 1)


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 .* torch.float32"):
        corrupt(torch.zeros(1, 1, 8, 8), "blur", 1)
