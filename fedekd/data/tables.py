"""Preprocessing of tables and of real-valued targets, fitted per client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data.columns import Column
from fedekd.data.samples import Samples

if TYPE_CHECKING:
    from fedekd.data.client_splits import ClientSplits

Values = npt.NDArray[np.float64]


class Prepared(NamedTuple):
    """Samples whose inputs and targets a network can be trained on.

    Attributes:
        samples: The samples; of a table with features, float32, shape (N, F).
        clients: Splits with shift and scale of real-valued targets.
        transformers: Fitted preprocessing of each client of a table, in order; empty for images.
    """

    samples: Samples
    clients: list[ClientSplits]
    transformers: list[Any]


def prepare(samples: Samples, clients: Sequence[ClientSplits]) -> Prepared:
    """Fit the preprocessing of each client on its training samples, and apply it.

    F depends on the columns and categories only, which are the same for all clients. Images, classes and grades are
    not changed.

    Args:
        samples: Samples; values of a table with NaN where missing.
        clients: Splits of all clients that own a sample.
    """
    if not samples.num_classes:
        clients = [_with_target_scale(samples, splits) for splits in clients]
    if not is_unprepared_table(samples):
        return Prepared(samples, list(clients), [])
    values = cast(torch.Tensor, samples.inputs).numpy()
    inputs = torch.zeros(len(samples), len(samples.feature_names))
    transformers = []
    for splits in clients:
        transformers.append(fit_transformer(samples.columns, values[splits.train.numpy()]))
        rows = torch.cat([splits.train, splits.validation, splits.test])
        if len(rows):
            inputs[rows] = transform(transformers[-1], values[rows.numpy()])
    return Prepared(replace(samples, inputs=inputs), list(clients), transformers)


def is_unprepared_table(samples: Samples) -> bool:
    """Return True for values of a table, which may be missing."""
    return bool(samples.columns) and samples.inputs.dtype == torch.float64


def standardised(samples: Samples) -> Samples:
    """Return a table without missing values, fitted on all rows; images as is."""
    if not is_unprepared_table(samples):
        return samples
    values = cast(torch.Tensor, samples.inputs).numpy()
    return replace(samples, inputs=transform(fit_transformer(samples.columns, values), values))


def fit_transformer(columns: Sequence[Column], values: Values) -> Any:
    """Fit imputation, scaling and one-hot coding, a `ColumnTransformer`.

    Numbers: the median replaces missing values, then mean 0 and variance 1; a column that is constant or empty in
    training becomes 0. Categories: the most frequent one replaces missing values; an empty column becomes zeros.

    Args:
        columns: Columns of the table.
        values: Training rows, shape (n, columns), n at least 1.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numeric = [index for index, column in enumerate(columns) if column.kind == "numeric"]
    categorical = [index for index, column in enumerate(columns) if column.categories]
    # Empty columns are filled with 0, which is no category.
    known = [np.arange(1.0, len(columns[index].categories) + 1) for index in categorical]
    median = SimpleImputer(strategy="median", keep_empty_features=True)
    most_frequent = SimpleImputer(strategy="most_frequent", keep_empty_features=True)
    one_hot = OneHotEncoder(categories=known, handle_unknown="ignore", sparse_output=False)
    transformer = ColumnTransformer(
        [
            ("numeric", make_pipeline(median, StandardScaler()), numeric),
            ("categorical", make_pipeline(most_frequent, one_hot), categorical),
        ]
    )
    transformer.fit(_from_one(transformer, values))
    if numeric:
        imputer, scaler = (step for _, step in transformer.named_transformers_["numeric"].steps)
        scaler.scale_[np.ptp(imputer.transform(values[:, numeric]), axis=0) == 0] = np.inf
    return transformer


def transform(transformer: Any, values: Values) -> Tensor:
    """Return the features of rows, float32, shape (n, F).

    Args:
        transformer: Result of `fit_transformer`.
        values: Rows, shape (n, columns).
    """
    return torch.from_numpy(transformer.transform(_from_one(transformer, values)).astype(np.float32))


def _from_one(transformer: Any, values: Values) -> Values:
    """Return rows whose categories are numbered from 1."""
    values = values.copy()
    values[:, transformer.transformers[1][2]] += 1.0
    return values


def _with_target_scale(samples: Samples, splits: ClientSplits) -> ClientSplits:
    """Return splits with mean and standard deviation of the training targets."""
    targets = samples.targets[splits.train.to(samples.targets.device)].double()
    scale = float(targets.std(correction=0))
    return replace(splits, target_shift=float(targets.mean()), target_scale=scale if scale > 0 else 1.0)
