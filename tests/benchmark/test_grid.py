"""Cells of a grid: products, keys, filters, and validation before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from fedekd.benchmark import Block, Cell, cells, parse_filter, require_valid
from fedekd.benchmark.grid import _as_text, cell_key
from fedekd.cli.benchmark import benchmark_parser
from fedekd.configuration.options import parse
from fedekd.early_exit.guarantee_coverage import CoverageOptions
from fedekd.errors import UserError

METHOD = {"FedeKD": {"class_path": "FedeKD"}}
BLOCK = Block(["digits"], [0.1, 0.5], [0, 1], {**METHOD, "FedAvg": {"class_path": "FedAvg"}})
COVERAGE = {"target_risks": [0.1, 0.3], "confidence": 0.8, "modes": ["ltt", "empirical"], "draws": 5}


def test_cells_are_the_distinct_product() -> None:
    grid = cells([BLOCK, BLOCK])
    assert len(grid) == len({cell.key for cell in grid}) == 8
    assert {(c.alpha, c.seed, c.method) for c in grid} == {
        (alpha, seed, method) for alpha in (0.1, 0.5) for seed in (0, 1) for method in ("FedeKD", "FedAvg")
    }
    assert [cell.group for cell in grid] == sorted(cell.group for cell in grid)
    assert len({cell.configuration for cell in grid}) == 4


def test_cells_errors_name_the_cell() -> None:
    with pytest.raises(UserError, match=r"^digits FedAvg, tuned: --method"):
        cells([Block(["digits"], [0.1], [0], {**METHOD, "FedAvg, tuned": {"class_path": "FedAvgg"}})])


def key(method: Mapping[str, Any], **options: Any) -> str:
    return cells([Block(["digits"], [0.1], [0], {"x": method}, options)])[0].key


def test_key_depends_on_options_that_affect_results() -> None:
    plain = key({"class_path": "FedeKD"})
    assert key({"class_path": "fedekd.methods.FedeKD", "init_args": {"beta": 1.0}}) == plain
    assert key({"class_path": "FedeKD"}, **{"trainer.threads": 2, "data.root": "elsewhere"}) == plain
    different = [
        key({"class_path": "FedeKD", "init_args": {"beta": 2.0}}),
        key({"class_path": "Local"}),
        key({"class_path": "FedeKD"}, rounds=4),
        *(key({"class_path": "FedeKD"}, **{"client.local_epochs": epochs}) for epochs in (3, 4)),
        *(key({"class_path": "DepthFL"}, **{"client.depths": depths}) for depths in (None, 2, [1, 2, 3])),
    ]
    assert len({plain, *different}) == 9


def test_parse_filter_conditions_select_cells() -> None:
    assert parse_filter("") == {}
    grid = cells([BLOCK], parse_filter("alpha=0.50,method=fedavg"))
    assert {(cell.alpha, cell.method) for cell in grid} == {(0.5, "FedAvg")}
    # Labels may contain commas.
    wanted = {"seed": "1", "method": "FedAvg, tuned", "alpha": "0.1"}
    assert parse_filter("seed=1,method=FedAvg, tuned,alpha=0.1") == wanted
    tuned = {"class_path": "FedAvg", "init_args": {"finetune_epochs": 1}}
    block = replace(BLOCK, methods={"FedAvg": {"class_path": "FedAvg"}, "FedAvg, tuned": tuned})
    assert [(cell.method, cell.seed) for cell in cells([block], wanted)] == [("FedAvg, tuned", 1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "expected NAME=VALUE") for text in ("alpha", "alpha=0.1,0.3", "dataset=digits, x", "x,method=A")),
        ("aplha=1", "Did you mean 'alpha'"),
    ],
)
def test_parse_filter_malformed_condition_raises(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_filter(text)


def test_block_config_selects_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, batch in (("digits.yaml", 16), ("mine/digits.yaml", 48)):
        (tmp_path / name).write_text(f"data: {{dataset: digits, batch_size: {batch}}}\n")
    block = Block(["digits"], [0.1], [0], METHOD)
    configs = ("{dataset}.yaml", "mine/{dataset}.yaml")
    plain, other = (cells([replace(block, config=config)], folder=tmp_path)[0] for config in configs)
    assert [cell.values["data"]["batch_size"] for cell in (plain, other)] == [16, 48]
    assert plain.key != other.key
    with pytest.raises(UserError, match="nowhere/digits"):
        cells([replace(block, config="nowhere/{dataset}.yaml")])


def test_as_text_writes_command_line_values() -> None:
    assert _as_text("adam") == "adam"
    assert json.loads(_as_text([1, 2, 3])) == [1, 2, 3]
    assert _as_text(None) == "null"
    spec = Namespace(class_path="a.B", init_args=Namespace(width=0.5))  # type: ignore[no-untyped-call]
    assert json.loads(_as_text([spec])) == [{"class_path": "a.B", "init_args": {"width": 0.5}}]


def test_require_valid_trainer_options_replace_those_of_the_grid() -> None:
    # A GPU without bfloat16.
    block = replace(BLOCK, methods={"L": {"class_path": "Local"}}, options={"trainer.precision": "16-mixed"})
    grid = cells([block])[:1]
    with pytest.raises(UserError, match=r"trainer\.precision: expected"):
        require_valid(grid, {"accelerator": "cpu"})
    require_valid(grid, {"accelerator": "cpu", "precision": "32-true"})


def covered(coverage: Any = None) -> Cell:
    return cells([Block(["digits"], [0.5], [0], METHOD, coverage=coverage)])[0]


def test_key_depends_on_dict_kwargs() -> None:
    def key(**arguments: Any) -> str:
        model = {"class_path": "torchvision.models.vit_b_16", **arguments}
        return cell_key({**covered().values, "client": {**covered().values["client"], "private_model": model}})

    keys = [key(), key(dict_kwargs={"dropout": 0.1}), key(dict_kwargs={"dropout": 0.2})]
    assert len({*keys}) == 3
    assert key(init_args={"dropout": 0.1}) == keys[1]


def test_key_depends_on_coverage_options() -> None:
    plain = covered()
    assert plain.key == plain.configuration == "9d62297c7db98c11"  # the configuration in results/digits.csv
    options = CoverageOptions(**COVERAGE)
    changes = [
        {},
        *({name: COVERAGE[name][:1]} for name in ("target_risks", "modes")),
        {"confidence": 0.7},
        {"draws": 6},
    ]
    grid = [covered(replace(options, **change)) for change in changes]
    assert len({plain.key, *(cell.key for cell in grid)}) == 1 + len(changes)
    assert grid[0].values == plain.values
    seeds = cells([Block(["digits"], [0.5], [0, 1], METHOD, coverage=options)])
    assert [cell.configuration for cell in seeds] == [grid[0].configuration] * 2
    assert seeds[0].key != seeds[1].key


def test_block_coverage_is_read_from_yaml(tmp_path: Path) -> None:
    grid = "blocks:\n- {datasets: [digits], alphas: [0.5], seeds: [0], methods: {FedeKD: {class_path: FedeKD}}"
    path = tmp_path / "grid.yaml"

    def read(coverage: str) -> Cell:
        path.write_text(f"{grid}, coverage: {coverage}}}\n")
        return cells(parse(benchmark_parser(), ["--config", str(path)]).blocks)[0]

    assert read(json.dumps(COVERAGE)) == covered(CoverageOptions(**COVERAGE))
    assert read("{draws: 5}").coverage == CoverageOptions(draws=5)
    for bad, words in (("{draws: 0}", "draws"), ("{modes: [plug-in]}", "empirical"), ("{rules: [ltt]}", "rules")):
        with pytest.raises(UserError, match=words) as raised:
            read(bad)
        assert "\n" not in str(raised.value)
