"""Keys of rows: options with their defaults, data, and the code that made them."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fedekd import methods, models
from fedekd.benchmark import Block, Cell, cells, grid, provenance, read_results, write_results
from fedekd.benchmark.grid import ADDED_OPTIONS, RENAMED_OPTIONS, resolved_options, short_name
from fedekd.benchmark.provenance import (
    code_digest,
    data_digest,
    finished_rows,
    mixture,
    others,
    record_code,
    recorded_code,
)
from fedekd.benchmark.results import COLUMNS, Row
from fedekd.benchmark.worker import run_cell
from fedekd.cli.benchmark import benchmark_parser
from fedekd.configuration.options import class_defaults, parse
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.early_exit.guarantee_coverage import CoverageOptions
from fedekd.functional import aggregators

ROOT = Path(__file__).resolve().parents[2]
LOCAL = {"L": {"class_path": "Local"}}

#: Options that are part of the keys of the committed rows.
FROZEN = (Path(__file__).parent / "frozen_options.txt").read_text().split()


def option_names() -> set[str]:
    """Names of all options that affect results, for every class of fedekd that can be chosen."""
    classes = [getattr(methods, name) for name in methods.__all__]
    classes = [item for item in classes if isinstance(item, type) and issubclass(item, methods.Method)]
    classes += [models.CIFARResNet, models.Conv3, models.PrivateCNN, models.ProxyCNN]
    classes += [
        item
        for item in vars(aggregators).values()
        if isinstance(item, type) and item.__module__ == aggregators.__name__
    ]
    names = {short_name(name) for name in resolved_options(cells([Block(["digits"], [0.1], [0], LOCAL)])[0].values)}
    for item in classes:
        arguments = class_defaults(f"{item.__module__}.{item.__qualname__}")
        names |= {f"{item.__name__}.{argument}" for argument in arguments.keys() - grid.FROM_DATA}
    for prefix, item in (("do_no_harm", DoNoHarm), ("coverage", CoverageOptions)):
        names |= {f"{prefix}.{field.name}" for field in dataclasses.fields(item)}
    return names


def test_options_of_stored_rows_are_frozen() -> None:
    names = option_names()
    added = names - set(FROZEN) - ADDED_OPTIONS.keys() - RENAMED_OPTIONS.keys()
    assert added == set(), (
        f"new options {sorted(added)} would change the key of every stored row: add each to ADDED_OPTIONS in"
        " fedekd/benchmark/grid.py, with the value that gives the numbers of before"
    )
    gone = set(FROZEN) - names - set(RENAMED_OPTIONS.values())
    assert gone == set(), f"options {sorted(gone)} are gone: add a renamed one to RENAMED_OPTIONS, else remove it here"


def test_key_depends_on_scheduler_callbacks_and_gradients_but_not_on_the_machine() -> None:
    step = {"client.scheduler": {"class_path": "StepLR", "init_args": {"step_size": 1}}}
    different: list[dict[str, Any]] = [
        {},
        step,
        {"client.scheduler": {"class_path": "StepLR", "init_args": {"step_size": 2}}},
        {**step, "client.scheduler_interval": "step"},
        {"trainer.callbacks": "LambdaCallback"},
        {"trainer.gradient_clip_val": 1.0},
        {"trainer.gradient_clip_val": 1.0, "trainer.gradient_clip_algorithm": "value"},
        {"trainer.accumulate_grad_batches": 2},
    ]
    keys = [cells([Block(["digits"], [0.1], [0], LOCAL, options)])[0].key for options in different]
    assert len(set(keys)) == len(keys)
    without = {"client.scheduler_interval": "step", "trainer.gradient_clip_algorithm": "value"}
    assert cells([Block(["digits"], [0.1], [0], LOCAL, without)])[0].key == keys[0]
    default = {"client.scheduler": {"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.1}}}
    assert cells([Block(["digits"], [0.1], [0], LOCAL, default)])[0].key == keys[1]
    machine = {"trainer.loop": "lean", "trainer.threads": 3, "trainer.precision": "64-true", "trainer.capture": False}
    assert cells([Block(["digits"], [0.1], [0], LOCAL, machine)])[0].key == keys[0]


@pytest.mark.parametrize("name", ["certified", "do_no_harm", "cafedistill"])
def test_grids_find_their_committed_rows(name: str) -> None:
    own = cells(parse(benchmark_parser(), ["--config", str(ROOT / f"configs/benchmark/{name}.yaml")]).blocks)
    assert len(finished_rows(read_results(ROOT / "results" / name), own)) == len(own)


def one_cell(dataset: str = "digits", method: Any = "FedeKD", seed: int = 0, **options: Any) -> Cell:
    options = {"data.dataset": dataset, **options}
    return cells([Block([dataset], [5.0], [seed], {"M": {"class_path": method}}, options, config="digits.yaml")])[0]


def row_of(cell: Cell, key: str = "row", **changes: str) -> Row:
    row = {**dict.fromkeys(COLUMNS, "0"), "key": key, "configuration": cell.configuration, "seed": str(cell.seed)}
    row |= {"dataset": cell.dataset, "alpha": str(cell.alpha), "method": cell.method, "metric": "accuracy"}
    return row | {"torch": torch.__version__, "code": code_digest(cell.values), "data": ""} | changes


def frame(*rows: Row) -> pd.DataFrame:
    return pd.DataFrame(rows).set_index("key", drop=False).rename_axis(None)


def test_key_depends_on_a_changed_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default of a method, of a model, of the clients, of do-no-harm and of an aggregator."""
    median = {"class_path": "fedekd.functional.aggregators.TrimmedMean"}
    method = {"M": {"class_path": "FedeKD", "init_args": {"aggregator": median}}}
    block = Block(["digits"], [5.0], [0], method, {"do_no_harm": True})

    def names_and_key() -> tuple[dict[str, Any], str]:
        [cell] = cells([block])
        return resolved_options(cell.values, cell.coverage), cell.key

    options, key = names_and_key()
    assert names_and_key()[1] == key
    for name in ("method.FedeKD.beta", "client.private_model.PrivateCNN.width", "client.exit_grid"):
        assert name in options
    for name in ("do_no_harm.confidence", "method.FedeKD.aggregator.TrimmedMean.fraction"):
        assert name in options
    with monkeypatch.context() as context:
        context.setattr(grid, "class_defaults", lambda path: class_defaults(path) | {"width": 0.5})
        assert names_and_key()[1] != key
    assert "client.optimizer.Adam.betas" not in options  # of PyTorch: its version is in the row


def test_added_and_renamed_options_keep_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = one_cell()
    newer = {**cell.values, "data": {**cell.values["data"], "invented": None}}
    assert grid.cell_key(newer) != cell.key
    monkeypatch.setitem(ADDED_OPTIONS, "data.invented", None)
    assert grid.cell_key(newer) == cell.key
    assert grid.cell_key({**newer, "data": {**newer["data"], "invented": 255}}) != cell.key
    arguments = {"sharpness" if name == "beta" else name: v for name, v in cell.values["method"]["init_args"].items()}
    renamed = {**cell.values, "method": {**cell.values["method"], "init_args": arguments}}
    monkeypatch.setattr(grid, "class_defaults", lambda path: {})
    before = grid.cell_key(cell.values)
    assert grid.cell_key(renamed) != before
    monkeypatch.setitem(RENAMED_OPTIONS, "FedeKD.sharpness", "FedeKD.beta")
    assert grid.cell_key(renamed) == before


def test_finished_rows_compare_the_data_that_are_here(
    write_blobs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_digest", provenance._digest.__wrapped__)
    path = write_blobs(tmp_path / "blobs.npz")
    cell = one_cell(str(path))
    first = data_digest(cell.values)
    assert first is not None
    rows = frame(row_of(cell, "unknown"), row_of(cell, "first", data=first), row_of(cell, "other seed", seed="1"))
    assert finished_rows(rows, [cell]) == {cell.key: "first"}
    write_blobs(path, seed=1)
    assert finished_rows(rows, [cell]) == {cell.key: "unknown"}
    assert finished_rows(rows.drop("unknown"), [cell]) == {}
    path.unlink()
    assert finished_rows(rows.drop("unknown"), [cell]) == {cell.key: "first"}


def test_others_counts_rows_that_were_made_otherwise() -> None:
    values = [one_cell(seed=seed) for seed in range(6)]
    digest = data_digest(values[0].values)
    assert digest
    changes: list[dict[str, str]] = [
        {"data": digest, "precision": "32-true"},
        {"data": digest, "precision": "32-true", "code": ""},
        {"data": digest, "precision": "32-true", "code": "0123"},
        {"data": digest, "precision": "32-true", "torch": "1.0"},
        {"data": "", "precision": "32-true"},
        {"data": digest, "precision": "bf16-mixed"},
    ]
    rows = frame(
        *(row_of(cell, str(i), **change) for i, (cell, change) in enumerate(zip(values, changes, strict=True)))
    )
    done = finished_rows(rows, values)
    assert others(rows, values, done, "32-true") == (
        "5 of 6 finished cells were made otherwise than now (1 by other code, 1 by unknown code, 1 from unknown data,"
        " 1 in bf16-mixed, 1 with torch 1.0). They are not repeated; give another --results, or remove their rows, to"
        " run them again."
    )
    assert "bf16" not in others(rows, values, done, "auto")
    assert others(rows, values[:1], {values[0].key: "0"}, "auto") == ""
    assert mixture(rows.iloc[:1]) == ""
    assert mixture(rows[["data", "code", "torch", "precision", "dataset"]]).startswith("The rows were not all made by")
    assert "torch: 1.0 (1), " in mixture(rows)


def test_code_digest_depends_on_the_user_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(provenance, "_code", provenance._code.__wrapped__)

    def digest(body: str, other: str = "") -> str:
        (tmp_path / "own_method.py").write_text(
            f"import own_part\nfrom fedekd.methods import Local\n\nclass Own(Local):\n    {body}\n"
        )
        (tmp_path / "own_part.py").write_text(other)
        for name in ("own_method", "own_part"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return code_digest(one_cell(method="own_method.Own").values)

    plain = digest("pass")
    assert digest("pass") == plain
    assert len({plain, digest("x = 1"), digest("pass", "y = 1"), code_digest(one_cell().values)}) == 4
    monkeypatch.setattr(provenance, "package_code", lambda: "other")
    assert digest("pass") != plain


def test_recorded_code_of_a_run_continued_by_other_code_is_mixed(tmp_path: Path) -> None:
    assert recorded_code(tmp_path) == ""
    for code, expected in (("a", "a"), ("a", "a"), ("b", "mixed"), ("a", "mixed")):
        record_code(tmp_path, code)
        assert recorded_code(tmp_path) == expected
    (tmp_path / "code.json").write_text("{}")
    assert recorded_code(tmp_path) == ""


def test_run_cell_of_replaced_data_has_another_row_and_folder(
    write_blobs: Callable[..., Path], tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_blobs(tmp_path / "blobs.npz")
    cell = one_cell(str(path), "Local", **{"rounds": 1, "client.local_epochs": 1, "data.num_clients": 2})
    trainer = {"accelerator": "cpu", "precision": "32-true", "threads": 1}
    rows = []
    for seed in (0, 0, 1):
        write_blobs(path, seed=seed)
        provenance.load_cell_samples.cache_clear()
        rows.append(run_cell(cell, tmp_path / "runs", trainer, tmp_path / "local", "abc"))
        rows[-1]["seconds"] = ""
    assert rows[0] == rows[1]
    assert all(rows[0][name] != rows[2][name] for name in ("data", "key"))
    assert rows[0]["configuration"] == rows[2]["configuration"]
    assert rows[2]["code"] == code_digest(cell.values) != ""
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {rows[0]["key"], rows[2]["key"]}


def test_results_of_earlier_versions_are_read_as_unknown(tmp_path: Path) -> None:
    cell = one_cell()
    old = frame(row_of(cell)).drop(columns=["code", "data"])
    old.to_csv(tmp_path / "digits.csv", index=False)
    rows = read_results(tmp_path)
    assert rows[["code", "data"]].to_numpy().tolist() == [["", ""]]
    write_results(tmp_path, rows)
    assert read_results(tmp_path).to_dict() == rows.to_dict()
    assert "1 by unknown code, 1 from unknown data" in others(rows, [cell], finished_rows(rows, [cell]), "auto")
