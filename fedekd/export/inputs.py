"""Raw inputs of an exported model, and the preprocessing inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedekd.data import scale
from fedekd.data.columns import Column

InputKind = Literal["pixels", "scaled_pixels", "table"]

_DTYPES: dict[str, torch.dtype] = {
    "pixels": torch.uint8,
    "scaled_pixels": torch.float32,
    "table": torch.float64,
}


@dataclass(frozen=True)
class InputFormat:
    """Raw inputs of an exported model.

    Args:
        kind: `pixels`: images, uint8, 0..255, which the model scales. `scaled_pixels`: images, float32 in [-1, 1], from
            16-bit or floating-point files. `table`: rows, float64, with NaN for missing values and the index of a
            category in its column.
        shape: Channels, height and width of an image, or number of columns.
        columns: Columns of a table; empty for images.
        is_resized: Whether images of other sizes were resized in training (`data.image_size`).
        value_range: Lowest and highest value of the files of `scaled_pixels`, which become -1 and 1; None for 0 and 1
            of floating-point files, 0 and 65535 of 16-bit files.
    """

    kind: InputKind
    shape: tuple[int, ...]
    columns: tuple[Column, ...] = ()
    is_resized: bool = False
    value_range: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Name of the input in an ONNX graph."""
        return {"pixels": "images", "scaled_pixels": "scaled_images", "table": "rows"}[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        """Type of a batch: uint8, float32 or float64."""
        return _DTYPES[self.kind]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` is the inverse."""
        return asdict(self) | {"name": self.name, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> InputFormat:
        """Create the format from the values of `to_json`."""
        columns = [Column(item["name"], item["kind"], tuple(item["categories"])) for item in values["columns"]]
        bounds = values["value_range"]
        return cls(
            values["kind"],
            tuple(values["shape"]),
            tuple(columns),
            values["is_resized"],
            None if bounds is None else (bounds[0], bounds[1]),
        )


class PixelScaling(nn.Module):
    """Scale uint8 pixels to [-1, 1]; inputs that are scaled already are unchanged.

    Args:
        dtype: Type of the network's weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the inputs of a network."""
        return scale(images).to(self.dtype)


class TablePreprocessing(nn.Module):
    """Impute, standardise and one-hot encode rows, as `fedekd.data.tables.transform`.

    Args:
        columns: Columns of the table.
        statistics: By name: `medians`, `means` and `scales` of the numeric columns, `modes` of the categorical ones,
            each a list in the order of the columns.
        dtype: Type of the network's weights.
    """

    medians: Tensor
    means: Tensor
    scales: Tensor

    def __init__(self, columns: Sequence[Column], statistics: dict[str, Sequence[float]], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.statistics, self.width = dtype, statistics, len(columns)
        self.numeric = [index for index, column in enumerate(columns) if column.kind == "numeric"]
        self.categorical = [
            (index, len(column.categories)) for index, column in enumerate(columns) if column.categories
        ]
        for name in ("medians", "means", "scales"):
            self.register_buffer(name, torch.tensor([float(v) for v in statistics[name]], dtype=torch.float64))
        self.modes = [float(value) for value in statistics["modes"]]

    @classmethod
    def from_transformer(cls, columns: Sequence[Column], transformer: Any, dtype: torch.dtype) -> TablePreprocessing:
        """Create the module from a fitted transformer of `fedekd.data.tables`."""
        statistics: dict[str, Sequence[float]] = {"medians": [], "means": [], "scales": [], "modes": []}
        steps = transformer.named_transformers_
        if any(column.kind == "numeric" for column in columns):
            imputer, scaler = (step for _, step in steps["numeric"].steps)
            statistics["medians"] = imputer.statistics_.tolist()
            statistics["means"], statistics["scales"] = scaler.mean_.tolist(), scaler.scale_.tolist()
        if any(column.categories for column in columns):
            # The transformer numbers categories from 1.
            statistics["modes"] = (steps["categorical"].steps[0][1].statistics_ - 1.0).tolist()
        return cls(columns, statistics, dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (B, columns) to features (B, F)."""
        parts = []
        if self.numeric:
            values = rows[:, self.numeric]
            values = torch.where(values.isnan(), self.medians, values)
            parts.append((values - self.means) / self.scales)
        for (index, count), mode in zip(self.categorical, self.modes, strict=True):
            codes = rows[:, index : index + 1]
            codes = torch.where(codes.isnan(), mode, codes)
            parts.append((codes == torch.arange(count, dtype=torch.float64)).double())
        return torch.cat(parts, dim=1).float().to(self.dtype)

    def rows_of(self, features: Tensor) -> Tensor:
        """Return rows (n, columns) that have the given features (n, F), up to round-off."""
        rows = torch.full((len(features), self.width), torch.nan, dtype=torch.float64)
        start = len(self.numeric)
        rows[:, self.numeric] = features[:, :start].double() * self.scales + self.means
        for index, count in self.categorical:
            block = features[:, start : start + count]
            rows[:, index] = torch.where(block.any(dim=1), block.argmax(dim=1), torch.nan).double()
            start += count
        return rows
