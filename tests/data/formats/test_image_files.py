from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fedekd.data import Samples
from fedekd.data.formats.image_files import ImageFiles, read_images, with_channels
from fedekd.data.pixels import to_pixels
from fedekd.data.raw import ReadOptions
from fedekd.errors import UserError

RNG = np.random.default_rng(0)
#: Modes by format in which PIL writes them.
MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "jpg": ("L", "RGB", "CMYK"),
    "bmp": ("1", "L", "P", "RGB"),
}


def picture(mode: str, height: int = 10, width: int = 9, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), np.float32))
    if mode == "P":
        return picture("RGB", height, width, seed).quantize(16)
    if mode == "1":
        return Image.fromarray(rng.random((height, width)) > 0.5)
    bands = Image.getmodebands(mode)
    array = rng.integers(0, 256, (height, width, bands), np.uint8)
    return (
        Image.fromarray(array[..., 0] if bands == 1 else array, mode)
        if bands == 1
        else Image.merge(mode, [Image.fromarray(array[..., band]) for band in range(bands)])
    )


def save(path: Path, image: Image.Image, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


def read(*paths: str, **options: Any) -> Any:
    return read_images(paths, [Path(path).name for path in paths], ReadOptions(**options))


def reference(path: str, channels: int) -> Any:
    """Pixel by pixel, as the definitions of the modes say."""
    image = ImageOps.exif_transpose(Image.open(path))
    image.load()
    if image.mode in ("I;16", "I", "F"):
        plane = np.asarray(image).astype(np.float32 if image.mode == "F" else np.uint16)
        return np.stack([plane] * channels, -1)
    rgba = image.convert("RGBA")
    out = np.zeros((image.height, image.width, 3), np.uint8)
    for row in range(image.height):
        for column in range(image.width):
            *colour, alpha = rgba.getpixel((column, row))
            out[row, column] = [int(value * alpha / 255 + 0.5) for value in colour]
    return out if channels == 3 else out[..., :1]


@settings(max_examples=60)
@given(data=st.data())
def test_read_images_equals_slow_reference(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    suffix = data.draw(st.sampled_from(sorted(MODES)))
    modes = data.draw(st.lists(st.sampled_from(MODES[suffix]), min_size=1, max_size=3))
    wide = [mode for mode in modes if mode in ("I;16", "F")]
    modes = [mode for mode in modes if mode == wide[0]] if wide else modes
    orientation = data.draw(st.integers(1, 8)) if suffix == "jpg" else 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = tmp_path_factory.mktemp("images")
    paths = [
        save(folder / f"{i}.{suffix}", picture(mode, seed=i), **({"exif": exif} if suffix == "jpg" else {}))
        for i, mode in enumerate(modes)
    ]
    found = read(*paths)
    channels = 1 if all(mode in ("1", "L", "LA", "I;16", "F") for mode in modes) else 3
    assert found.inputs.shape[1:] == (*((9, 10) if orientation >= 5 else (10, 9)), channels)
    for values, path in zip(found.inputs, paths, strict=True):
        np.testing.assert_allclose(values.astype(float), reference(path, channels).astype(float), atol=1)
        if "A" not in Image.open(path).mode:
            np.testing.assert_array_equal(values, reference(path, channels))


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
@pytest.mark.parametrize("image_size", [None, [8, 12]])
def test_read_images_above_the_limit_have_the_same_values(tmp_path: Path, mode: str, image_size: Any) -> None:
    paths = [save(tmp_path / f"{i}.png", picture(mode, seed=i)) for i in range(40)]
    array = read(*paths, image_size=image_size).inputs
    files = pickle.loads(pickle.dumps(read(*paths, image_size=image_size, memory_limit=0).inputs))
    assert isinstance(files, ImageFiles)
    pixels = to_pixels("all", array)[0]
    assert (files.shape, files.dtype, files.nbytes) == (pixels.shape, pixels.dtype, pixels.nbytes)
    np.testing.assert_array_equal(np.stack([files[i] for i in range(40)]), pixels)
    np.testing.assert_array_equal(files.take(np.array([7, 3]))[1], pixels[3])
    if mode == "L":
        np.testing.assert_array_equal(with_channels(files, 3)[5], np.repeat(pixels[5], 3, -1))


def test_load_has_the_memory_of_samples_so_that_they_are_not_copied(tmp_path: Path) -> None:
    found = read(save(tmp_path / "a.png", picture("RGB"))).inputs
    assert np.moveaxis(found, -1, 1).flags.c_contiguous
    inputs = Samples.from_arrays("one", np.repeat(found, 2, 0), np.arange(2), "classification", 2).inputs
    np.testing.assert_array_equal(inputs[1].permute(1, 2, 0), found[0])


def test_read_images_resize_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    for values in (stripes, stripes.astype(np.uint16) * 256):
        found = read(save(tmp_path / "a.png", Image.fromarray(values)), image_size=16).inputs
        assert found.dtype == values.dtype
        assert abs(found[0, 2:-2, 2:-2].astype(float) / values.max() - 0.5).max() < 0.05


def test_read_images_grey_palette_is_grey(tmp_path: Path) -> None:
    image = Image.fromarray(RNG.integers(0, 4, (8, 8), np.uint8), "P")
    image.putpalette([0, 0, 0, 80, 80, 80, 160, 160, 160, 240, 240, 240])
    found = read(save(tmp_path / "a.png", image)).inputs
    np.testing.assert_array_equal(found[0, ..., 0], 80 * np.asarray(image))


def test_read_images_tiff_orientation_is_applied(tmp_path: Path) -> None:
    image = picture("L", 10, 8)
    found = read(save(tmp_path / "a.tif", image, tiffinfo={0x0112: 6})).inputs
    np.testing.assert_array_equal(found[0, ..., 0], np.rot90(np.asarray(image), -1))


def broken(path: Path, kind: str) -> str:
    if kind == "text":
        path.write_text("no image")
    elif kind == "cut":
        image = Image.fromarray(RNG.integers(0, 256, (64, 64), np.uint8))
        save(path, image)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.touch()
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("text", "not an image"), ("cut", "truncated"), ("empty", "not an image"), ("gone", "not found")],
)
@pytest.mark.parametrize("memory_limit", [0, 1])
def test_unreadable_image_is_named_or_left_out(tmp_path: Path, kind: str, words: str, memory_limit: float) -> None:
    good = [save(tmp_path / f"{i}.png", picture("L", 64, 64, i)) for i in range(2)]
    paths = [good[0], broken(tmp_path / "bad.png", kind), good[1]]
    with pytest.raises(UserError, match=rf"image 'bad\.png'.*{words}") as caught:
        read(*paths, memory_limit=memory_limit).inputs[1]
    assert "\n" not in str(caught.value)
    found = read(*paths, memory_limit=memory_limit, skip_unreadable=True)
    assert found.is_read.tolist() == [True, False, True]
    np.testing.assert_array_equal(found.inputs[1][..., 0], np.asarray(Image.open(good[1])))
    [line] = found.warnings
    assert "1 of 3 images cannot be read and are left out: 'bad.png'" in line
    with pytest.raises(UserError, match=r"expected at least one readable image"):
        read(broken(tmp_path / "only.png", kind), skip_unreadable=True)


def test_images_of_two_sizes_or_types_or_frames_raise_with_names(tmp_path: Path) -> None:
    small, large = (save(tmp_path / f"{size}.png", picture("L", size, 9)) for size in (8, 12))
    with pytest.raises(UserError, match=r"8x9 \('8\.png'\) and 12x9 \('12\.png'\)\. Set --data\.image_size"):
        read(small, large)
    assert read(small, large, image_size=10).inputs.shape == (2, 10, 10, 1)
    deep = save(tmp_path / "deep.png", picture("I;16", 8, 9))
    with pytest.raises(UserError, match=r"one type, got uint8 \('8\.png'\) and uint16 \('deep\.png'\)"):
        read(small, deep)
    stack = save(tmp_path / "stack.tif", picture("L"), save_all=True, append_images=[picture("L")])
    with pytest.raises(UserError, match=r"'stack\.tif': expected one image per file, got 2"):
        read(stack)


@pytest.mark.parametrize("size", [7, [8], [8, 9, 10], [8, 7], 8.5, [8, 9.5], "8", 10**9, [8, 16385]])
def test_image_size_invalid_raises(tmp_path: Path, size: Any) -> None:
    with pytest.raises(UserError, match=r"data\.image_size: expected one whole number in 8\.\.16384"):
        read(save(tmp_path / "a.png", picture("L")), image_size=size)


def test_digest_of_image_contents_depends_on_each_byte(tmp_path: Path) -> None:
    contents = [Path(save(tmp_path / f"{i}.bmp", picture("L", seed=i))).read_bytes() for i in range(3)]

    def digest(contents: list[bytes]) -> str:
        options = ReadOptions(memory_limit=0)
        return str(read_images(contents, ["a", "b", "c"], options).inputs.digest())

    assert digest(contents) == digest([*contents])
    assert digest([*contents[:2], contents[2][:-1] + bytes([contents[2][-1] ^ 1])]) != digest(contents)


def test_digest_of_a_removed_image_names_it(tmp_path: Path) -> None:
    files = read(save(tmp_path / "a.png", picture("L")), memory_limit=0).inputs
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"image 'a\.png' cannot be read \(file not found\)"):
        files.digest()
