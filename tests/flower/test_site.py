"""One site: its data, its folder, and its replies; and the settings of the apps."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict

from examples.flower_deployment.deployment import write_site_data
from fedekd.configuration.options import parts_of
from fedekd.data.columns import Column
from fedekd.data.sources import SOURCES
from fedekd.errors import UserError
from fedekd.federation.engines.worker import StateStore
from fedekd.flower import apps
from fedekd.flower.apps import Settings, make_client_app
from fedekd.flower.description import SPLITS, describe, require_consistent_sites
from fedekd.flower.messages import (
    BASELINE,
    DESCRIBE,
    LAST_ROUND,
    ROUND,
    SCORE,
    arrays_of,
    client_result_from_json,
    from_arrays,
    pack,
    values_of,
)
from fedekd.flower.site import KEPT_VERSIONS, Site

from .conftest import NUM_SITES, is_equal

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("empty_site_cache")]


def request(message_type: str, values: dict[str, Any], state: Any = None) -> Message:
    """A message from the server."""
    return Message(pack(values, state), 5, message_type)


def run_round(site: Site, version: int, round_idx: int) -> Any:
    """The result of one round with the server's initial proxy."""
    proxy = site.spec.build_model("proxy", "server").state_dict()
    message = request(ROUND, {"round": round_idx, "version": version, "comparison": None}, proxy)
    reply = Message(site.reply(message), reply_to=message)
    return client_result_from_json(values_of(reply), from_arrays(arrays_of(reply)))


def assert_equal_results(result: Any, other: Any) -> None:
    assert is_equal(dict(result.update.state), dict(other.update.state))
    assert result.update.num_samples == other.update.num_samples
    assert (result.score, result.logs, result.supervised_rounds) == (
        other.score,
        other.logs,
        other.supervised_rounds,
    )


def saved_versions(folder: Path, number: int = 0) -> list[int]:
    """The versions on a site's disk."""
    files = (folder / f"site-{number:03d}/states").glob("*/*.pt")
    return sorted(int(path.stem.rpartition("-")[2]) for path in files)


@pytest.mark.parametrize("channels", [1, 3])
def test_site_own_file_has_splits_of_partition(
    channels: int, options: list[str], write_blobs: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_blobs(tmp_path / "all.npz", 90, channels=channels, num_classes=4, seed=2)
    all_options = [*options, f"--data.dataset={path}", "--data.num_classes=4"]
    data = parts_of(all_options)["data"]
    paths = write_site_data(data, tmp_path / "files")
    assert paths == [tmp_path / f"files/site-{number}/images.npz" for number in range(NUM_SITES)]
    for number, path in enumerate(paths):
        site = Site(all_options, number, NUM_SITES, tmp_path / "folder", data=str(path))
        client = data.clients[number]
        assert site.splits.client == site.number == number
        assert len(site.samples) == len(client) < 90
        assert site.splits.digest(site.samples) == client.digest(data.samples)
        for split in SPLITS:
            indices, expected = getattr(site.splits, split), getattr(client, split)
            assert torch.equal(site.samples.inputs[indices], data.samples.inputs[expected]), split
            assert torch.equal(site.samples.targets[indices], data.samples.targets[expected]), split
        assert site.samples.num_classes == 4


def test_site_own_file_gives_result_of_partition(options: list[str], tmp_path: Path) -> None:
    [_, path, _] = write_site_data(parts_of(options)["data"], tmp_path / "files")
    from_partition = Site(options, 1, NUM_SITES, tmp_path / "a")
    from_file = Site([*options, "--data.num_classes=3"], 1, NUM_SITES, tmp_path / "b", data=str(path))
    assert_equal_results(run_round(from_partition, 0, 1), run_round(from_file, 0, 1))


def test_site_reports_its_own_data_once_per_run(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path, *_] = write_site_data(parts_of(options)["data"], tmp_path / "files")
    with np.load(path) as file:
        arrays = {name: np.repeat(file[name], 10, axis=0) for name in file if len(file[name])}
    np.savez(
        path,
        **{name: np.where(array == 2, 255, array) if "labels" in name else array for name, array in arrays.items()},
    )
    all_options = [*options, "--data.num_classes=3"]
    with pytest.raises(UserError, match=r"--data\.ignore_label 255"):
        Site(all_options, 0, NUM_SITES, tmp_path / "folder", data=str(path))
    site = Site([*all_options, "--data.ignore_label=255"], 0, NUM_SITES, tmp_path / "folder", data=str(path))
    run_round(site, 0, 0)
    assert "warning" not in capsys.readouterr().err
    site.reply(request(DESCRIBE, {}))
    text = capsys.readouterr().err
    assert text.count("warning: site 0: ") == 2
    assert "have the label 255" in text
    assert "near-copies" in text


def test_site_writes_only_into_its_folder(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    site = Site(options, 2, NUM_SITES, tmp_path / "folder")
    run_round(site, 0, 0)
    site.reply(request(BASELINE, {"rounds": 1}))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"site-002"}
    assert saved_versions(tmp_path / "folder", 2) == [1]
    assert len(list((tmp_path / "folder/site-002/local").iterdir())) == 1


def test_site_invalid_request_raises_one_line(options: list[str], tmp_path: Path) -> None:
    site = Site(options, 1, NUM_SITES, tmp_path)
    for message_type in (ROUND, LAST_ROUND, SCORE):
        values = {"round": 1, "version": 7, "comparison": None}
        with pytest.raises(
            UserError, match=r"site 1: version 7 of the client state is not in .*Use the folder"
        ) as caught:
            site.reply(request(message_type, values, {}))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"site 1: unknown message type 'train\.other'"):
        site.reply(request("train.other", {}))
    assert saved_versions(tmp_path, 1) == []


def test_site_shared_folder_keeps_federations_apart(options: list[str], tmp_path: Path) -> None:
    undisturbed = Site(options, 1, NUM_SITES, tmp_path / "undisturbed")
    run_round(undisturbed, 0, 0)
    run_round(Site(options, 1, NUM_SITES, tmp_path / "shared"), 0, 0)
    run_round(Site([*options, "--seed=1"], 1, NUM_SITES, tmp_path / "shared"), 0, 0)
    resumed = run_round(Site(options, 1, NUM_SITES, tmp_path / "shared"), 1, 1)
    assert_equal_results(resumed, run_round(undisturbed, 1, 1))


def test_site_same_version_gives_same_result_and_old_versions_are_deleted(options: list[str], tmp_path: Path) -> None:
    site = Site(options, 0, NUM_SITES, tmp_path)
    results, versions = [], []
    for version in range(KEPT_VERSIONS + 2):
        results.append(run_round(site, version, version))
        versions.append(saved_versions(tmp_path))
    assert versions[0] == [1]
    assert max(map(len, versions)) == KEPT_VERSIONS == 4
    assert versions[-1] == [3, 4, 5, 6]
    # The server has resumed from an older checkpoint: later versions are invalid, and the result is the same.
    assert_equal_results(run_round(Site(options, 0, NUM_SITES, tmp_path), 4, 4), results[4])
    assert saved_versions(tmp_path) == [3, 4, 5]
    run_round(site, 0, 0)
    assert saved_versions(tmp_path) == [1]


def test_site_failed_first_round_is_repeated_with_same_result(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> None:
        raise OSError("the disk is full")

    expected = run_round(Site(options, 0, NUM_SITES, tmp_path / "undisturbed"), 0, 1)
    site = Site(options, 0, NUM_SITES, tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "write", write)
        with pytest.raises(OSError, match="full"):
            run_round(site, 0, 1)
    result = run_round(site, 0, 1)
    assert result.supervised_rounds == 1
    assert_equal_results(result, expected)


def test_site_damaged_state_is_named_and_repeated_from_the_version_before(options: list[str], tmp_path: Path) -> None:
    site = Site(options, 1, NUM_SITES, tmp_path)
    run_round(site, 0, 0)
    run_round(site, 1, 1)
    [path] = (tmp_path / "site-001/states").glob("*/client-00001-000002.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    for message_type in (ROUND, SCORE):
        with pytest.raises(UserError, match=r"site 1: .*000002\.pt: the state .* is damaged: .*Restore") as caught:
            site.reply(request(message_type, {"round": 2, "version": 2, "comparison": None}, {}))
        assert "\n" not in str(caught.value)
    run_round(site, 1, 1)
    assert path.read_bytes() == whole


def test_site_partition_of_other_size_raises(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.num_clients: expected 4 \(sites\), got 3\. Set both") as caught:
        Site(options, 0, 4, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


INVALID_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"sites": 3}, "options: missing in the run configuration"),
    ({"options": "--rounds 1"}, "sites: missing in the run configuration"),
    ({}, "options: missing in the run configuration"),
    ({"options": "", "sites": 0}, "sites: expected at least 1, got 0"),
    ({"options": "", "sites": "three"}, "sites: expected a number, got 'three'"),
    ({"options": "", "sites": 2, "timeout": -1.0}, r"timeout: expected at least 0 seconds, got -1\.0"),
    ({"options": "", "sites": 2, "timeout": "1h"}, "timeout: expected a number, got '1h'"),
    ({"options": "", "sites": 2, "wait": -0.5}, r"wait: expected at least 0 seconds, got -0\.5"),
    ({"options": "", "sites": 2, "wait": math.nan}, "wait: expected at least 0 seconds, got nan"),
    ({"options": "--config 'mine.yaml", "sites": 2}, "options: expected options of fit, got .* No closing quotation"),
    ({"options": "", "sites": 3, "secure": "yes"}, "secure: expected true or false, got 'yes'"),
    *(
        ({"options": "", "sites": 3, "secure_range": value}, f"secure_range: expected a power of two, got {value}")
        for value in (0.0, -2.0, 3.0, math.nan, math.inf)
    ),
]


@pytest.mark.parametrize(("run_config", "message"), INVALID_SETTINGS, ids=str)
def test_settings_invalid_value_raises_one_line(run_config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Settings.from_run_config(run_config)
    assert "\n" not in str(caught.value)


def test_settings_options_are_split_like_in_a_shell() -> None:
    run_config = {"options": "--config 'my own.yaml' --rounds 3", "sites": 3, "timeout": 60, "other": "ignored"}
    run_config |= {"secure": True, "secure_range": 4}
    expected = Settings(("--config", "my own.yaml", "--rounds", "3"), 3, timeout=60, secure=True, secure_range=4.0)
    assert Settings.from_run_config(run_config) == expected


def node_context(**node_config: Any) -> Context:
    return Context(1, 5, node_config, RecordDict(), {})


def test_client_app_reads_number_from_node_config(options: list[str], tmp_path: Path) -> None:
    app = make_client_app(Settings(tuple(options), NUM_SITES, folder=str(tmp_path / "shared")))
    for config, number in ({"number": 2}, 2), ({"partition-id": 1, "num-partitions": 3}, 1), ({"number": 0, "a": 1}, 0):
        assert values_of(app(request(DESCRIBE, {}), node_context(**config)))["site"] == number
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"site-000", "site-001", "site-002"}
    with pytest.raises(UserError, match="number: missing in the node configuration"):
        app(request(DESCRIBE, {}), node_context(data="images.npz"))


def test_client_app_reads_folder_data_and_options_from_node_config(options: list[str], tmp_path: Path) -> None:
    [path, *_] = write_site_data(parts_of(options)["data"], tmp_path / "files")
    model = "--client.private_model=fedekd.models.ProxyCNN --data.num_classes=3"
    context = node_context(number=0, data=str(path), folder=str(tmp_path / "mine"), options=model)
    context.run_config = {"options": shlex.join(options), "sites": NUM_SITES, "folder": str(tmp_path / "shared")}
    reply = make_client_app()(request(DESCRIBE, {}), context)
    expected = Site(options, 0, NUM_SITES, tmp_path / "simulated")
    simulated = values_of(Message(expected.reply(message := request(DESCRIBE, {})), reply_to=message))
    assert values_of(reply) == {**simulated, "name": "images"}
    assert not (tmp_path / "shared").exists()
    site = apps._site((*options, *shlex.split(model)), 0, NUM_SITES, str(tmp_path / "mine"), str(path), "images")
    assert apps._site.cache_info().hits == 1
    assert type(site.worker.engine.client(0).networks["private"]).__name__ == "ProxyCNN"


def test_site_table_is_preprocessed_on_its_own_training_rows(tmp_path: Path) -> None:
    table = pd.read_csv(str(SOURCES["heart_disease"].load))
    mlp = "{class_path: fedekd.models.MLP, init_args: {hidden: [8]}}"
    options = [
        *(f"--client.private_model={mlp}", f"--client.proxy_model={mlp}", "--data.target_column=disease"),
        *("--data.ignored_columns=[site,sex,cp,fbs,restecg,exang,slope,thal,ca]", "--trainer.accelerator=cpu"),
    ]
    sites = []
    for number, name in enumerate(("cleveland", "hungarian")):
        table[table["site"] == name].to_csv(tmp_path / f"{name}.csv", index=False)
        sites.append(Site(options, number, 2, tmp_path, data=str(tmp_path / f"{name}.csv")))
    for site in sites:
        train = site.samples.inputs[site.splits.train]
        assert train.shape[1] == 5
        assert train[:, 0].mean().item() == pytest.approx(0, abs=1e-5)
        assert site.spec.input_shape == (5,)
    descriptions = [describe(site.method, site.spec, site.samples, site.splits) for site in sites]
    require_consistent_sites(descriptions)
    first = sites[0].samples
    other = replace(first, columns=(*first.columns[:-1], Column("mass", "numeric")))
    descriptions[0] = describe(sites[0].method, sites[0].spec, other, sites[0].splits)
    with pytest.raises(UserError, match=r"site 1: expected a table with the columns .* of site 0"):
        require_consistent_sites(descriptions)
