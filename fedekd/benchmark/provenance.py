"""Data and code of a row: their digests, and rows that were made by others."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedekd.atomic import atomic_file, seal_json, unseal_json
from fedekd.benchmark.grid import Cell
from fedekd.data import Samples, load_samples
from fedekd.data.sources import DATA_OPTIONS
from fedekd.errors import UserError
from fedekd.federation.source_code import SourceUnavailableError, code_of, package_code

#: `code` of a row whose run was continued by other code.
MIXED = "mixed"


def samples_of(values: Mapping[str, Any]) -> Samples:
    """Load the samples of a run from its configuration.

    Raises:
        UserError: If they cannot be loaded.
    """
    return load_cell_samples(_data_options(values))


@lru_cache(maxsize=1)  # cells are sorted by data set
def load_cell_samples(options: str) -> Samples:
    """Load the samples of a cell; the last ones are kept.

    Args:
        options: Arguments of `load_samples` as JSON.
    """
    return load_samples(**json.loads(options))


def data_digest(values: Mapping[str, Any]) -> str | None:
    """Return the digest of the samples; None if they are not here.

    Nothing is downloaded, and a data set is read once.
    """
    try:
        return _digest(_data_options(values, download=False))
    except UserError:
        return None


@lru_cache
def _digest(options: str) -> str:
    return load_samples(**json.loads(options)).digest()


def _data_options(values: Mapping[str, Any], **changed: Any) -> str:
    """Return the arguments of `load_samples` as JSON."""
    options = {**values["data"], "task": values["task"]}
    given = {name: options[name] for name in DATA_OPTIONS if name in options}
    return json.dumps({**given, "name": options["dataset"], **changed}, sort_keys=True)


def row_key(cell: Cell, data: str) -> str:
    """Return the key of a row: a hash of the cell's options and of the data."""
    return sha256(f"{cell.key} {data}".encode()).hexdigest()[:16]


def code_digest(values: Mapping[str, Any]) -> str:
    """Return a hash of the code that decides a run's numbers.

    It covers the files of fedekd, those of the user's classes in the configuration and of all that they import, and
    the versions of other packages that these import. Empty if a class has no file.
    """
    return _code(tuple(sorted({path.rpartition(".")[0] for path in _class_paths(values)})))


@cache
def _code(modules: tuple[str, ...]) -> str:
    own = [name for name in modules if name.partition(".")[0] not in ("", "fedekd", "torch")]
    try:
        content = {"package": package_code(), "user": code_of(own)}
    except SourceUnavailableError:
        return ""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _class_paths(values: Any) -> Iterator[str]:
    """Yield the class paths in a configuration, and the path of the partition."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name in ("class_path", "partition") and isinstance(value, str):
                yield value
            elif name in ("private_models", "callbacks") and value is not None:
                yield from (item for item in ([value] if isinstance(value, str) else value) if isinstance(item, str))
            elif name in ("lr_lambda", "scale_fn") and isinstance(value, str):  # of a scheduler
                yield value
            if name not in ("logger", "engine"):
                yield from _class_paths(value)
    elif isinstance(values, list):
        for value in values:
            yield from _class_paths(value)


def record_code(folder: Path, code: str) -> None:
    """Add the present code to the codes that have worked on a run."""
    known = _recorded(folder)
    if code not in known:
        with atomic_file(folder / "code.json") as file:
            file.write(seal_json({"codes": [*known, code]}))


def recorded_code(folder: Path) -> str:
    """Return the code that made a run; `MIXED` for several."""
    known = _recorded(folder)
    return MIXED if len(known) > 1 else "".join(known)


def _recorded(folder: Path) -> list[str]:
    path = folder / "code.json"
    if not path.exists():
        return []
    codes: list[str] = [""]
    with suppress(ValueError):  # of a damaged file: not known
        codes = unseal_json(path.read_bytes())["codes"]
    return codes


def finished_rows(rows: pd.DataFrame, grid: Sequence[Cell]) -> dict[str, str]:
    """Find the rows of a grid's finished cells.

    A row finishes a cell with the same options if its data are those of this machine. Where one of the two is not
    known, the options decide.

    Args:
        rows: Rows as `read_results` returns them.
        grid: The cells.

    Returns:
        Key of the row by key of the cell.
    """
    candidates: dict[tuple[str, str], dict[str, str]] = {}
    for key, configuration, seed, data in zip(
        *(rows[name] for name in ("key", "configuration", "seed", "data")), strict=True
    ):
        candidates.setdefault((configuration, seed), {})[data] = key
    found = {}
    for cell in grid:
        keys = candidates.get((cell.configuration, str(cell.seed)), {})
        data = data_digest(cell.values) if any(keys) else None
        match = next(reversed(keys.values()), None) if data is None else keys.get(data, keys.get(""))
        if match is not None:
            found[cell.key] = match
    return found


def others(rows: pd.DataFrame, grid: Sequence[Cell], finished: Mapping[str, str], precision: str) -> str:
    """Count the finished rows that a run today would not repeat exactly.

    Args:
        rows: Rows as `read_results` returns them.
        grid: The cells.
        finished: Result of `finished_rows`.
        precision: Requested precision; `auto` is not compared.

    Returns:
        One line; empty if there is no such row.
    """
    counts: dict[str, int] = {}
    differing = set()
    for cell in grid:
        if cell.key not in finished:
            continue
        row = rows.loc[finished[cell.key]]
        reasons = {
            "by other code": row["code"] not in ("", code_digest(cell.values)),
            "by unknown code": row["code"] == "",
            "from unknown data": row["data"] == "",
            f"with torch {row['torch']}": row["torch"].partition("+")[0] != torch.__version__.partition("+")[0],
            f"in {row['precision']}": precision not in ("auto", row["precision"]),
        }
        for reason, holds in reasons.items():
            if holds:
                counts[reason] = counts.get(reason, 0) + 1
                differing.add(cell.key)
    if not counts:
        return ""
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    return (
        f"{len(differing)} of {len(finished)} finished cells were made otherwise than now ({listed}). They are not"
        " repeated; give another --results, or remove their rows, to run them again."
    )


def mixture(rows: pd.DataFrame, columns: Collection[str] = ("data", "code", "torch", "precision")) -> str:
    """Describe rows that were not made by one code and one version of torch.

    Returns:
        One line; empty for rows that agree.
    """
    parts = []
    for name in columns:
        values = rows.groupby("dataset")[name].unique() if name == "data" else [rows[name].unique()]
        if any(len(distinct) > 1 for distinct in values):
            counts = rows[name].replace("", "unknown").value_counts().sort_index()
            parts.append(f"{name}: " + ", ".join(f"{value[:12]} ({count})" for value, count in counts.items()))
    return f"The rows were not all made by the same code, versions and data ({'; '.join(parts)})." if parts else ""
