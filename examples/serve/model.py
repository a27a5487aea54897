"""An exported model in onnxruntime; needs neither fedekd nor torch."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image, ImageOps

FULL, EARLY = "model.onnx", "model_early_exit.onnx"

Array = npt.NDArray[Any]


class InputError(ValueError):
    """Raised for inputs that the model does not take; the text is for the caller."""


class OnnxModel:
    """Predictions of an exported folder.

    One sample runs in `model_early_exit.onnx`, which leaves at its exit; more run in `model.onnx`, with the same
    predictions.

    Args:
        folder: Folder of `fedekd export --format onnx`.
        threads: Threads of one run.

    Attributes:
        card: Content of `model_card.json`.

    Raises:
        InputError: If a file is missing, or does not match its SHA-256 in the card.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        try:
            self.card: dict[str, Any] = json.loads((folder / "model_card.json").read_text())
            contents = {entry["name"]: (folder / entry["name"]).read_bytes() for entry in self.card["files"]}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: expected a folder of fedekd export --format onnx, got {error!r}") from error
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

    def predict(self, inputs: Array, uses_exits: bool = True) -> list[dict[str, Any]]:
        """Predict a batch.

        Args:
            inputs: Raw inputs, shape (B, ...), as `decode_json` and `decode_image` return them.
            uses_exits: False to run one sample in the file for batches, too.

        Returns:
            One row per sample: `label`, `class`, `probabilities`, `score` and `exit`; `value` and `exit` in regression.
        """
        session = self._early if len(inputs) == 1 and uses_exits else self._full
        names = [output.name for output in session.get_outputs()]
        arrays = dict(zip(names, session.run(None, {self.format["name"]: inputs}), strict=True))
        arrays.pop("logits", None)
        classes = self.card["model"]["classes"]
        rows = [{name: array[index].tolist() for name, array in arrays.items()} for index in range(len(inputs))]
        return [row | {"class": classes[row["label"]]} if "label" in row else row for row in rows]

    def decode_image(self, content: bytes) -> Array:
        """Decode an image file as in training, shape (1, C, H, W).

        Raises:
            InputError: If it is not an image, or one of another size or type.
        """
        if self.format["kind"] != "pixels":
            raise InputError("expected JSON: the model was not trained on images with 8 bits")
        channels, height, width = self.shape
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            is_8_bit = not image.mode.startswith(("I", "F"))
            if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
                picture = image.convert("RGBA")
                black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
                image = Image.alpha_composite(black, picture).convert("RGB")
            image = image.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # plugins of PIL raise various errors
            raise InputError(f"expected an image file, got {type(error).__name__}: {error}") from error
        if not is_8_bit:
            raise InputError("expected an image with 8 bits")
        if image.size != (width, height):
            if not self.format["is_resized"]:
                raise InputError(f"expected {height}x{width} pixels, got {image.size[1]}x{image.size[0]}")
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image).reshape(height, width, channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

    def decode_json(self, inputs: Any) -> Array:
        """Convert `inputs` of a request: nested lists of numbers, or rows of a table.

        Raises:
            InputError: If shape, type or range are others.
        """
        if not isinstance(inputs, list) or not inputs:
            raise InputError("inputs: expected a list with at least one sample")
        if self.format["kind"] == "table":
            return np.asarray([self._row(row) for row in inputs], dtype=np.float64)
        try:
            array = np.asarray(inputs, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise InputError("inputs: expected nested lists of numbers of one shape") from error
        if array.shape[1:] != self.shape:
            raise InputError(f"inputs: expected shape (batch, {', '.join(map(str, self.shape))}), got {array.shape}")
        if self.format["kind"] == "pixels":
            if not ((array >= 0) & (array <= 255) & (array == np.rint(array))).all():
                raise InputError("inputs: expected whole numbers 0..255; the model scales them")
            return array.astype(np.uint8)
        if not (np.abs(array) <= 1).all():
            raise InputError("inputs: expected numbers in [-1, 1]")
        return array.astype(np.float32)

    def _row(self, row: Any) -> Sequence[float]:
        """Return the values of a row: numbers, and indices of categories."""
        columns: Sequence[Mapping[str, Any]] = self.format["columns"]
        names = [column["name"] for column in columns]
        if not isinstance(row, dict) or set(row) - set(names):
            raise InputError(f"inputs: expected rows with the columns {', '.join(names)}")
        return [_value(column, row.get(column["name"])) for column in columns]


def _value(column: Mapping[str, Any], value: Any) -> float:
    """Return a number, or the index of a category; NaN for a missing value."""
    if value is None:
        return math.nan
    categories = column["categories"]
    if not categories:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{column['name']}: expected a number or null, got {value!r}")
        return float(value)
    if str(value) not in categories:
        raise InputError(f"{column['name']}: expected one of {', '.join(categories)}, got {value!r}")
    return float(categories.index(str(value)))
