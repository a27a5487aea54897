"""Columns of `predict`, and their CSV or Parquet file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jsonargparse import ArgumentParser
from torch import Tensor

from fedekd.atomic import atomic_file
from fedekd.data.formats.table import require_pyarrow
from fedekd.errors import require
from fedekd.methods import Client

#: Suffixes of the files that can be written.
SUFFIXES = (".csv", ".parquet")

#: Decimals of scores and probabilities, and significant digits of values.
_DECIMALS, _DIGITS = 6, 6


class Outputs(NamedTuple):
    """Outputs of one batch: logits (B, C) or values (B, 1), exits (B,), scores (B,).

    Attributes:
        logits: Unnormalised log-probabilities, or values in the unit of the targets.
        exits: Exit of each sample, from 0.
        scores: Confidence score of each sample.
        members: By name of each member of an ensemble, its outputs at the sample's exit, as `logits`.
        monitored: Columns that `monitor` follows, by name.
    """

    logits: Tensor
    exits: Tensor
    scores: Tensor
    members: Mapping[str, Tensor]
    monitored: Mapping[str, list[Any]] = {}


def add_output_arguments(parser: ArgumentParser) -> None:
    """Add the options of the file of predictions and of its columns."""
    parser.add_argument(
        "--output",
        type=str,
        default="predictions.csv",
        help="CSV or Parquet file, by its suffix, with the columns image (row in a table), file, label, class, exit and"
        " score; value and exit in regression.",
    )
    parser.add_argument(
        "--probabilities",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Add a column probability_CLASS per class.",
    )
    parser.add_argument(
        "--members",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Of an ensemble: add a column label_MEMBER per member, value_MEMBER in regression.",
    )
    parser.add_argument(
        "--monitoring",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Add the columns that `monitor` follows: sample, model, policy, confidence, disagreement, and the outputs"
        " of the federated and of the local model. Costs complete forward passes.",
    )


def check_output(output: str) -> None:
    """Check the name of a file of predictions.

    Raises:
        UserError: If its suffix is unknown, it is a directory, or pyarrow is missing.
    """
    path = Path(output)
    is_file = path.suffix in SUFFIXES and not path.is_dir()
    require(is_file, "--output", "the name of a .csv or .parquet file", output)
    if path.suffix == ".parquet":
        require_pyarrow("--output", "write")


def prediction_columns(client: Client, outputs: Outputs, with_probabilities: bool) -> dict[str, list[Any]]:
    """Return the columns of a batch; exits are numbered from 1.

    Classification has `label`, `class` if classes have names, `exit` and `score`; `probability_CLASS` if requested;
    and `label_MEMBER` of each member. Regression has `value`, `exit` and `value_MEMBER`. The columns of `monitor` are
    last.

    Args:
        client: The client whose network predicts.
        outputs: Outputs of a batch.
        with_probabilities: Add the probability of each class.
    """
    is_regression = client.spec.task == "regression"
    columns = _values(outputs) if is_regression else _labels(client, outputs, with_probabilities)
    return {**columns, **outputs.monitored}


def _values(outputs: Outputs) -> dict[str, list[Any]]:
    members = {f"value_{name}": _rounded(values) for name, values in outputs.members.items()}
    return {"value": _rounded(outputs.logits), "exit": (outputs.exits + 1).tolist(), **members}


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values[:, 0].tolist()]


def _labels(client: Client, outputs: Outputs, with_probabilities: bool) -> dict[str, list[Any]]:
    labels, names = outputs.logits.argmax(dim=1).tolist(), client.samples.class_names
    columns: dict[str, list[Any]] = {"label": labels}
    if not client.samples.has_numbered_classes:
        columns["class"] = [names[label] for label in labels]
    columns["exit"] = (outputs.exits + 1).tolist()
    columns["score"] = _decimals(outputs.scores)
    if with_probabilities:
        probabilities = outputs.logits.double().softmax(dim=1).unbind(dim=1)
        columns |= {f"probability_{name}": _decimals(values) for name, values in zip(names, probabilities, strict=True)}
    return columns | {f"label_{name}": logits.argmax(dim=1).tolist() for name, logits in outputs.members.items()}


def _decimals(values: Tensor) -> list[float]:
    return [round(value, _DECIMALS) for value in values.tolist()]


def write_predictions(output: Path, kind: str, predictions: pd.DataFrame, names: Sequence[str] | None) -> None:
    """Write the predictions atomically.

    Args:
        output: A .csv or .parquet file.
        kind: First column: `image`, numbered from 0, or `row` of a table, numbered from 1.
        predictions: Columns of `prediction_columns` of all batches.
        names: Name of the file of each image, the second column; None without files.
    """
    frame = predictions.copy(deep=False)
    if names is not None:
        frame.insert(0, "file", list(names))
    first = int(kind == "row")
    frame.insert(0, kind, range(first, first + len(frame)))
    content = io.BytesIO()
    if output.suffix == ".parquet":
        frame.to_parquet(content, engine="pyarrow", index=False)
    else:
        frame.to_csv(content, index=False, lineterminator="\n")
    with atomic_file(output) as stream:
        stream.write(content.getvalue())
