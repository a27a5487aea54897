"""Sites with names and files of their own: a run on Flower equals a local run on the folder of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict

from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.flower import apps
from fedekd.flower.apps import Settings, make_client_app, serve
from fedekd.flower.description import require_consistent_sites, require_description
from fedekd.flower.messages import DESCRIBE, pack, values_of

from .conftest import NODES, FakeGrid, request_lost

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("empty_site_cache")]

NAMES = ["Basel", "Zürich (CH) no. 1"]

FAST = (
    *("--client.local_epochs=1", "--rounds=2", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null"),
    *("--data.batch_size=16", "--quiet"),
)
MLPS = ("--client.private_model=fedekd.models.MLP", "--client.proxy_model=fedekd.models.MLP")


def write_tables(folder: Path) -> list[Path]:
    """Write a table per site with groups, given splits and names of classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for name in NAMES:
        labels = np.arange(50) % 2
        frame = pd.DataFrame({"age": rng.normal(labels * 3), "sex": rng.choice(["f", "m"], 50)})
        frame = frame.assign(label=np.asarray(["well", "sick"])[labels], patient=np.arange(50) // 2)
        frame.loc[3, "age"] = np.nan
        paths.append(folder / f"{name}.csv")
        frame.assign(split=np.repeat(["train", "val", "test"], [30, 10, 10])).to_csv(paths[-1], index=False)
    return paths


class Nodes:
    """ClientApps with a node configuration each, behind a grid in this process."""

    def __init__(self, folder: Path, options: tuple[str, ...], configs: list[dict[str, Any]]) -> None:
        self.settings = Settings(options, len(configs), output=str(folder / "server"), wait=0.0)
        self.grid = FakeGrid()
        app = make_client_app(self.settings)

        def node(config: dict[str, Any]) -> Callable[[Message], RecordDict]:
            context = Context(1, 5, config, RecordDict(), {})
            return lambda message: app(message, context).content

        for number, config in enumerate(configs):
            self.grid.nodes[NODES[number]] = node(
                {"number": number, "folder": str(folder / f"node-{number}"), **config}
            )

    def describe(self, number: int) -> dict[str, Any]:
        message = Message(pack({}), NODES[number], DESCRIBE)
        reply = self.grid.nodes[NODES[number]]
        assert callable(reply)
        return values_of(Message(reply(message), reply_to=message))


TABLE_OPTIONS = (*FAST, *MLPS, "--data.group_column=patient", "--data.splits=given")


@pytest.mark.parametrize("kind", ["tables", "images", "simulation"])
def test_serve_named_sites_equals_local_run_on_their_folder(
    kind: str, tmp_path: Path, undrawn: None, write_blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if kind != "images":
        paths, options = write_tables(tmp_path / "sites"), TABLE_OPTIONS
    else:
        (tmp_path / "sites").mkdir()
        paths = [write_blobs(tmp_path / f"sites/{name}.npz", 60, seed=seed) for seed, name in enumerate(NAMES)]
        options = FAST
    folders = (f"--output={tmp_path}/local", f"--baseline_dir={tmp_path}/baselines")
    assert main(["fit", *options, f"--data.sites={tmp_path}/sites", *folders]) == 0
    configs = [{"data": str(path)} for path in paths]
    if kind == "simulation":
        options, configs = (*options, f"--data.sites={tmp_path}/sites"), [{}, {}]
    nodes = Nodes(tmp_path, options, configs)
    capsys.readouterr()
    summary = serve(nodes.grid, nodes.settings)
    assert "Basel" in capsys.readouterr().out
    local = json.loads((tmp_path / "local/summary.json").read_text())
    assert [row["name"] for row in summary["clients"]] == NAMES
    assert summary.get("class_names") == (["sick", "well"] if kind != "images" else None)
    different = {"dataset", "seconds", "versions"}
    assert {k: v for k, v in summary.items() if k not in different} == {
        k: v for k, v in local.items() if k not in different
    }
    assert (tmp_path / "server/metrics.csv").read_bytes() == (tmp_path / "local/metrics.csv").read_bytes()


def test_serve_named_sites_with_the_options_of_the_local_run_reads_no_sites_at_the_server(
    tmp_path: Path, undrawn: None
) -> None:
    paths = write_tables(tmp_path / "sites")
    options = (*TABLE_OPTIONS, "--data.sites=/does/not/exist", "--rounds=1")
    nodes = Nodes(tmp_path, options, [{"data": str(path), "name": f"site {i}"} for i, path in enumerate(paths)])
    summary = serve(nodes.grid, nodes.settings)
    assert [row["name"] for row in summary["clients"]] == ["site 0", "site 1"]
    assert "alpha" not in summary
    config = (tmp_path / "server/config.yaml").read_text()
    assert "num_clients" not in config
    assert "/does/not/exist" in config


def test_node_config_name_is_validated_and_defaults_to_the_stem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path, _] = write_tables(tmp_path / "sites")
    names: dict[str, Any] = {"own": "Luzern", "none": ""}
    for name, expected in ((names["own"], "Luzern"), ("", None), (None, "Basel")):
        config = {"data": str(path), **({} if name is None else {"name": name})}
        assert Nodes(tmp_path, TABLE_OPTIONS, [config]).describe(0)["name"] == expected
    for name in ("a/b", "x" * 61, 7, "\x1b[31m"):
        with pytest.raises(UserError, match="site 0: its data or options cannot be used"):
            Nodes(tmp_path, TABLE_OPTIONS, [{"data": str(path), "name": name}]).describe(0)
        assert "name: expected a name of at most 60 letters" in capsys.readouterr().err
    with pytest.raises(UserError, match="its data or options cannot be used"):
        Nodes(tmp_path, (*TABLE_OPTIONS, "--data.site_column=ward"), [{"data": str(path)}]).describe(0)
    assert "data.site_column: expected null with data in --node-config" in capsys.readouterr().err


@pytest.fixture
def descriptions(tmp_path: Path) -> list[dict[str, Any]]:
    """Descriptions of two named sites with tables."""
    paths = write_tables(tmp_path / "sites")
    nodes = Nodes(tmp_path, TABLE_OPTIONS, [{"data": str(path)} for path in paths])
    described = [nodes.describe(number) for number in range(2)]
    for description in described:
        require_description(description)
    require_consistent_sites(described)
    return described


def test_description_of_a_table_names_classes_but_no_column_or_group(descriptions: list[dict[str, Any]]) -> None:
    assert descriptions[0]["class_names"] == ["sick", "well"]
    text = json.dumps(descriptions)
    assert not [word for word in ("age", "sex", "patient") if f'"{word}' in text]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in ("\x1b[31mred", "x" * 10**6, "", "a/b", 7, ["a"], True)),
        *(("class_names", value) for value in (["sick"], ["sick", "sick"], ["sick", 1], "ab", ["sick", "a\nb"])),
        *(("class_names", value) for value in (["sick", ""], ["sick", "x" * 10**6], {"sick": 1, "well": 2})),
        *(("columns", value) for value in ("x", 1, "0" * 63, "\x00" * 64)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_require_description_hostile_names_raise_one_short_line(
    field: str, value: Any, descriptions: list[dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=f"^{field}: expected ") as caught:
        require_description({**descriptions[0], field: value})
    assert len(str(caught.value)) <= 390
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "BASEL"}, "name: expected different names, got 'BASEL' at sites 0 and 1. Set name in --node-config"),
        ({"name": None}, "name: expected one at every site or at none"),
        (
            {"class_names": ["ill", "well"]},
            "site 'Zürich (CH) no. 1': expected the classes sick, well, as at site 'Basel', got ill, well. Set"
            " --data.classes to the same names at all sites",
        ),
        ({"class_names": None}, "expected the classes sick, well, as at site 'Basel', got 0..1. Set --data.classes"),
        ({"columns": "0" * 64}, "expected a table with the columns and categories of site 'Basel'. Set --data.categ"),
    ],
)
def test_require_consistent_sites_other_names_raise(
    change: dict[str, Any], message: str, descriptions: list[dict[str, Any]]
) -> None:
    descriptions[1] |= change
    with pytest.raises(UserError) as caught:
        require_consistent_sites(descriptions)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "change", "message"),
    [
        # Of the configuration, as of a network with 2 outputs; the counts decide on the names of classes.
        (
            1,
            {"class_counts": [20, 20, 10, 0, 0]},
            "site 'Zürich (CH) no. 1': classes: expected 5 (class_counts), got 2",
        ),
        (0, {"class_counts": [20, 20, 10, 0, 0]}, "site 'Basel': classes: expected 5 (class_counts), got 2"),
        (0, {"classes": "x" * 300_000}, "site 'Basel': classes: expected 2 (class_counts), got 'xxx"),
        (0, {"classes": float("nan")}, "site 'Basel': classes: expected 2 (class_counts), got nan"),
        (0, {"metric": "x" * 300_000}, "site 'Basel': metric: expected one of accuracy"),
        (0, {"metric": ["accuracy"]}, "site 'Basel': metric: expected one of accuracy"),
        (0, {"class_counts": [50], "classes": 1}, "site 'Basel': classes: expected at least 2, got 1"),
    ],
    ids=["second", "first", "text", "nan", "metric", "list", "one"],
)
def test_require_consistent_sites_classes_that_are_not_counted_raise(
    changed: int, change: dict[str, Any], message: str, descriptions: list[dict[str, Any]]
) -> None:
    for description in descriptions:
        description["class_names"] = None
    config = {name: value for name, value in change.items() if name != "class_counts"}
    descriptions[changed]["config"] |= config
    descriptions[changed] |= {name: value for name, value in change.items() if name == "class_counts"}
    with pytest.raises(UserError) as caught:
        require_consistent_sites(descriptions)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) <= 390


def test_serve_missing_site_is_reported_by_name(
    tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_tables(tmp_path / "sites")
    nodes = Nodes(tmp_path, (*TABLE_OPTIONS, "--rounds=2"), [{"data": str(path)} for path in paths])
    nodes.settings = Settings(nodes.settings.options, 2, output=nodes.settings.output, wait=0.0, timeout=5.0)

    def intercept(message: Message, reply: Any) -> Any:
        is_lost = message.metadata.message_type == "train.round" and message.metadata.dst_node_id == NODES[1]
        return request_lost(message, reply) if is_lost and values_of(message)["round"] == 1 else reply()

    nodes.grid.intercept = intercept
    serve(nodes.grid, nodes.settings)
    assert "no valid reply from site 'Zürich (CH) no. 1'; left out of this round" in capsys.readouterr().err


def spoil_cell(path: Path) -> tuple[str, ...]:
    """Put text into a numeric column."""
    frame = pd.read_csv(path).astype({"age": object})
    frame.loc[41, "age"] = "Mrs Miller born 1961"
    frame.to_csv(path, index=False)
    return ()


def spoil_group(path: Path) -> tuple[str, ...]:
    """Put a group into two given splits."""
    frame = pd.read_csv(path)
    frame["patient"] = ["Mrs Miller born 1961" if row in (0, 49) else f"p{row}" for row in range(50)]
    frame.to_csv(path, index=False)
    return ()


def spoil_image(path: Path) -> tuple[str, ...]:
    """Put an unreadable image into the folder that replaces a table."""
    path.unlink()
    for label in ("sick", "well"):
        folder = path.with_suffix("") / label
        folder.mkdir(parents=True)
        (folder / "Mrs Miller born 1961.png").write_bytes(b"no image")
    return ("--data.image_size=8", "--data.splits=random", "--data.group_column=null")


@pytest.mark.parametrize("spoil", [spoil_cell, spoil_group, spoil_image])
def test_reply_wrong_data_keeps_values_and_paths_in_the_log_of_the_site(
    spoil: Callable[[Path], tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path, _] = write_tables(tmp_path / "sites")
    options = (*TABLE_OPTIONS, *spoil(path))
    data = path if path.exists() else path.with_suffix("")
    nodes = Nodes(tmp_path, options, [{"data": str(data), "name": "Basel"}])
    with pytest.raises(UserError, match="site 'Basel': its data or options cannot be used; the reason is in the site"):
        serve(nodes.grid, nodes.settings)
    [reply] = nodes.grid.replies
    reason = str(reply.error.reason)
    assert not [word for word in ("Miller", "1961", "age", "patient", str(tmp_path)) if word in reason]
    assert "Miller" in capsys.readouterr().err


def test_reply_other_exception_keeps_its_text_in_the_log_of_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError("Mrs Miller born 1961")

    monkeypatch.setattr(apps, "_name_of", fail)
    [path, _] = write_tables(tmp_path / "sites")
    nodes = Nodes(tmp_path, TABLE_OPTIONS, [{"data": str(path), "name": "\x1b[31m"}])
    with pytest.raises(UserError) as caught:
        nodes.describe(0)
    assert str(caught.value) == "site 0: it failed; the reason is in the site's log"
    assert "KeyError: 'Mrs Miller born 1961'" in capsys.readouterr().err
