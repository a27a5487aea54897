"""An exported model in onnxruntime; needs neither fedekd nor torch."""

from __future__ import annotations

import hashlib
import io
import json
import math
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image, ImageOps, UnidentifiedImageError

FULL, EARLY = "model.onnx", "model_early_exit.onnx"

#: Groups of a card that are no column of the data: a request does not name them.
CLASSES = ("true_class", "predicted_class")

#: Pixels of an image file that is resized.
MOST_PIXELS = 50_000_000

Array = npt.NDArray[Any]


class InputError(ValueError):
    """Raised for inputs that the model does not take; the text is for the caller."""


class OnnxModel:
    """Predictions of an exported folder.

    One sample runs in `model_early_exit.onnx`, which computes nothing after its exit; more run in `model.onnx`, with
    the same predictions.

    Args:
        folder: Folder of `fedekd export --format onnx`.
        threads: Threads of one run.

    Attributes:
        card: Content of `model_card.json`.

    Raises:
        InputError: If a file is missing or invalid, or does not match its SHA-256 in the card.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        try:
            self._load(folder, threads)
        except InputError:
            raise
        except Exception as error:  # invalid cards and files raise various errors
            raise InputError(
                f"{folder}: expected a folder of fedekd export --format onnx, got {_text(error)}"
            ) from error

    def _load(self, folder: Path, threads: int) -> None:
        self.card: dict[str, Any] = json.loads((folder / "model_card.json").read_text())
        contents = {entry["name"]: (folder / entry["name"]).read_bytes() for entry in self.card["files"]}
        for entry in self.card["files"]:
            if hashlib.sha256(contents[entry["name"]]).hexdigest() != entry["sha256"]:
                raise InputError(f"{folder / entry['name']}: expected the SHA-256 of the model card")
        if FULL not in contents:
            raise InputError(f"{folder}: expected {FULL}, which fedekd export --format onnx writes")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._full = onnxruntime.InferenceSession(contents[FULL], options, providers=["CPUExecutionProvider"])
        self._early = self._full
        if EARLY in contents:
            self._early = onnxruntime.InferenceSession(contents[EARLY], options, providers=["CPUExecutionProvider"])
        self.format: dict[str, Any] = self.card["model"]["inputs"]
        self.shape = tuple(self.format["shape"])
        self.classes: list[str] = self.card["model"]["classes"]

    def predict(self, inputs: Array, uses_exits: bool = True) -> list[dict[str, Any]]:
        """Predict a batch.

        Args:
            inputs: Raw inputs, shape (B, ...), as `decode_json` and `decode_image` return them.
            uses_exits: False to run one sample in the file for batches, too.

        Returns:
            One row per sample: `label`, `class`, `probabilities`, `score` and `exit`; `value` and `exit` in regression.

        Raises:
            InputError: If an output is not finite.
        """
        session = self._early if len(inputs) == 1 and uses_exits else self._full
        names = [output.name for output in session.get_outputs()]
        arrays = dict(zip(names, session.run(None, {self.format["name"]: inputs}), strict=True))
        arrays.pop("logits", None)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise InputError("inputs: expected values with finite outputs, got NaN or infinity")
        rows = [{name: array[index].tolist() for name, array in arrays.items()} for index in range(len(inputs))]
        return [row | {"class": self.classes[row["label"]]} if "label" in row else row for row in rows]

    def check_group(self, group: Any) -> None:
        """Check that a request is of a group that the guarantee of the model covers.

        Args:
            group: Group that the request names, as text or number, or None. Not checked if the card has no groups, or
                classes as groups.

        Raises:
            InputError: If the request names no group, or another one than the card.
        """
        groups = (self.card.get("guarantee") or {}).get("groups", {"column": "", "names": []})
        if groups["column"] and groups["column"] not in CLASSES and str(group) not in groups["names"]:
            names, value = ", ".join(groups["names"]), "none" if group is None else reprlib.repr(group)
            raise InputError(f"group: expected {groups['column']} {names}, got {value}")

    def decode_image(self, content: bytes) -> Array:
        """Decode an image file as in training, shape (1, C, H, W).

        The values are uint8, or float32 in [-1, 1] for a model of scaled pixels.

        Raises:
            InputError: If it is not an image, or one of another size, type or range of values.
        """
        if self.format["kind"] == "table" or self.shape[0] not in (1, 3):
            raise InputError(f"expected JSON, got a file: the model takes {self.format['name']} of shape {self.shape}")
        channels, height, width = self.shape
        try:
            image: Image.Image = Image.open(io.BytesIO(content))
            self._check_header(image)
            image = ImageOps.exif_transpose(image)
            if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
                picture = image.convert("RGBA")
                black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
                image = Image.alpha_composite(black, picture).convert("RGB")
            is_wide = image.mode.startswith(("I", "F"))
            if not is_wide:
                image = image.convert("L" if channels == 1 else "RGB")
        except InputError:
            raise
        except UnidentifiedImageError as error:
            raise InputError(
                f"expected an image file as the body, got {len(content)} bytes of another type. JSON needs"
                " content-type: application/json; a form (curl -F) is not accepted"
            ) from error
        except Exception as error:  # plugins of PIL raise various errors
            raise InputError(f"expected an image file, got {_text(error)}") from error
        if image.size != (width, height):
            if not self.format["is_resized"]:
                raise InputError(f"expected {height}x{width} pixels, got {image.size[1]}x{image.size[0]}")
            is_whole = image.mode != "F"
            if is_wide:  # whole numbers are rounded after the resize, as in training
                image = Image.fromarray(np.asarray(image).astype(np.float32))
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            if is_wide and is_whole:
                image = Image.fromarray(np.rint(np.asarray(image)).astype(np.int32))
        pixels = np.asarray(image)
        if self.format["kind"] == "scaled_pixels":
            pixels = self._scaled(pixels)
        if is_wide:
            pixels = np.repeat(pixels[..., None], channels, -1)
        return np.ascontiguousarray(pixels.reshape(height, width, channels).transpose(2, 0, 1)[None])

    def _scaled(self, pixels: Array) -> Array:
        """Scale the values of a file to [-1, 1], as in training."""
        if pixels.dtype == np.uint8:
            return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
        default = (0.0, 1.0) if pixels.dtype.kind == "f" else (0.0, 65535.0)
        low, high = self.format["value_range"] or default
        if not (low <= pixels.min() and pixels.max() <= high):  # also NaN
            raise InputError(f"expected values in {low:g}..{high:g}, got {pixels.min():g}..{pixels.max():g}")
        values = (pixels.astype(np.float32) - np.float32(low)) / (np.float32(high) - np.float32(low))
        return values * np.float32(2) - np.float32(1)

    def _check_header(self, image: Image.Image) -> None:
        """Check type and size of an image before it is decoded."""
        channels, height, width = self.shape
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # the second image of MPO is a preview
            raise InputError(f"expected one image per file, got {frames}")
        if self.format["kind"] == "pixels" and image.mode.startswith(("I", "F")):
            raise InputError(f"expected an image with 8 bits, got the mode {image.mode}")
        if channels == 1 and not _is_grey(image):
            raise InputError(f"expected a grey image, got the mode {image.mode}")
        pixels = image.width * image.height
        if self.format["is_resized"]:
            if pixels > MOST_PIXELS:
                raise InputError(f"expected at most {MOST_PIXELS} pixels, got {pixels}")
        elif image.size not in ((width, height), (height, width)):  # EXIF may turn it
            raise InputError(f"expected {height}x{width} pixels, got {image.height}x{image.width}")

    def decode_json(self, inputs: Any) -> Array:
        """Convert `inputs` of a request: nested lists of numbers, or rows of a table.

        Raises:
            InputError: If shape, type or range are others.
        """
        if not isinstance(inputs, list) or not inputs:
            raise InputError(f"inputs: expected a list with at least one sample, got {reprlib.repr(inputs)}")
        if self.format["kind"] == "table":
            return np.asarray([self._row(row) for row in inputs], dtype=np.float64)
        try:
            array = np.asarray(inputs)
        except ValueError as error:
            raise InputError("inputs: expected nested lists of one shape, got lists of several lengths") from error
        if array.dtype.kind not in "iuf":  # also None, and integers of more than 64 bits
            raise InputError(f"inputs: expected nested lists of numbers, got {reprlib.repr(inputs)}")
        if array.shape[1:] != self.shape:
            raise InputError(f"inputs: expected shape (batch, {', '.join(map(str, self.shape))}), got {array.shape}")
        if self.format["kind"] == "pixels":
            is_valid = (array >= 0) & (array <= 255) & (array == np.rint(array))
            if not is_valid.all():
                value = array[~is_valid][0]
                raise InputError(f"inputs: expected whole numbers 0..255, got {value}. The model scales them")
            return array.astype(np.uint8)
        is_valid = np.abs(array) <= 1
        if not is_valid.all():
            raise InputError(f"inputs: expected numbers in [-1, 1], got {array[~is_valid][0]}")
        return array.astype(np.float32)

    def _row(self, row: Any) -> Sequence[float]:
        """Return the values of a row: numbers, and indices of categories."""
        columns: Sequence[Mapping[str, Any]] = self.format["columns"]
        names = [column["name"] for column in columns]
        if not isinstance(row, dict) or set(row) != set(names):
            actual = sorted(row) if isinstance(row, dict) else row
            raise InputError(
                f"inputs: expected rows with the columns {', '.join(names)}, null for a missing value, got"
                f" {reprlib.repr(actual)}"
            )
        return [_value(column, row[column["name"]]) for column in columns]


def _value(column: Mapping[str, Any], value: Any) -> float:
    """Return a number, or the index of a category; NaN for a missing value."""
    if value is None:
        return math.nan
    categories = column["categories"]
    if not categories:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:  # also NaN; math.isfinite fails for huge integers
            raise InputError(f"{column['name']}: expected a finite number or null, got {reprlib.repr(value)}")
        return float(value)
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if isinstance(value, list | dict) or text not in categories:
        raise InputError(f"{column['name']}: expected one of {', '.join(categories)}, got {reprlib.repr(value)}")
    return float(categories.index(text))


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.asarray(image.getpalette() or [], np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _text(error: Exception) -> str:
    """Return an error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
