"""Use of a site's own model, from the site's folder alone."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

pytest.importorskip("flwr")

from flwr.app import Message

from fedekd.cli import main
from fedekd.configuration.site_parts import SiteParts
from fedekd.configuration.trained import open_run, open_site
from fedekd.data.sources import SOURCES
from fedekd.early_exit import ExitPolicy
from fedekd.errors import UserError
from fedekd.federation.run_folder import first_difference
from fedekd.flower.messages import LAST_ROUND, ROUND, pack
from fedekd.flower.site import Site
from fedekd.methods.serving import ENSEMBLE, LOCAL

from .conftest import RecordingObserver, Run, ServerStoppedError, Sites, is_equal, run_in_process

pytestmark = pytest.mark.flower

EXITS = ("--client.exits=2", "--client.optimizer.lr=0.003")


class Federation:
    """The same federation between sites and in one process, both finished.

    Attributes:
        site: By number, the folder of a site.
        run: The single-process run.
    """

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.run = run_in_process(options, folder / "run")
        sites = Sites(folder, options, self.run.folder / "local")
        sites.server().run()
        self.site = [folder / f"hospital-{number}" for number in range(sites.count)]


@pytest.fixture(scope="module")
def federations(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Federation]:
    """Build a federation with further options, once per module."""
    built: dict[tuple[str, ...], Federation] = {}

    def build(*more: str) -> Federation:
        if more not in built:
            built[more] = Federation(tmp_path_factory.mktemp("federation"), [*options, *more])
        return built[more]

    return build


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """New images of the size of the training images."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "new.npz", images=pixels)
    return tmp_path / "new.npz"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def finish(site: Site) -> None:
    """Train a site with the server's initial proxy to the last round."""
    proxy = site.spec.build_model("proxy", "server").state_dict()
    for round_idx in range(site.spec.rounds + 1):
        kind = ROUND if round_idx < site.spec.rounds else LAST_ROUND
        values = {"round": round_idx, "version": round_idx, "comparison": None}
        site.reply(Message(pack(values, proxy), 5, kind))


def test_open_site_has_the_client_of_the_run_bit_for_bit(sites: Sites, single_process: Run) -> None:
    sites.server().run()
    expected, progress = single_process.client_states(), single_process.orchestrator.progress
    for number in range(sites.count):
        trained = open_site("predict", sites.folder / f"hospital-{number}")
        [client] = trained.clients
        assert client.number == number
        assert is_equal(client.state_dict(), expected[number])
        assert first_difference(asdict(trained.records[number]), asdict(progress.records[number])) is None
        assert first_difference(trained.local_metrics[number], progress.local_values(number)) is None
        assert (trained.spec.rounds, trained.spec.num_clients) == (2, 3)


def test_commands_of_a_site_give_the_files_of_the_run(
    federations: Callable[..., Federation], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = federations(*EXITS)
    run, site = federation.run.folder, federation.site[1]
    for more in (["--familywise"], []):
        for source in ([str(run)], ["--site", str(site)]):
            assert main(["calibrate", *source, "--target_risk=0.6", "--confidence=0.5", *more]) == 0
            # A site replaces one of the policies of the federation, the run all of them.
            is_broken = "the replaced policy was one of 3" in capsys.readouterr().out
            assert is_broken == (source[0] == "--site" and not more)
        policies = [ExitPolicy.load(folder / "exits/client-001.json") for folder in (run, site / "site-001")]
        assert policies[0] == policies[1]
        assert policies[0].simultaneous_clients == (3 if more else 1)
    wide = ["--input", str(images), "--probabilities", "true"]
    assert main(["predict", str(run), "--client=1", *wide, f"--output={tmp_path}/run.csv"]) == 0
    for suffix in ("csv", "parquet"):
        assert main(["predict", "--site", str(site), *wide, f"--output={tmp_path}/site.{suffix}"]) == 0
    assert (tmp_path / "site.csv").read_bytes() == (tmp_path / "run.csv").read_bytes()
    table = pd.read_csv(tmp_path / "site.csv")
    assert list(table) == ["image", "label", "exit", "score", *(f"probability_{label}" for label in range(3))]
    assert set(table["exit"]) == {1, 2}
    assert table.filter(like="probability_").sum(axis=1).sub(1).abs().max() < 3e-6
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "site.parquet"), table)
    capsys.readouterr()
    assert main(["test", "--site", str(site)]) == 0
    assert "the same as after the last round" in capsys.readouterr().out


def test_export_of_a_site_has_the_weights_of_the_run(
    federations: Callable[..., Federation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    federation = federations(*EXITS)
    monkeypatch.chdir(tmp_path)
    command = ["export", "--format=safetensors"]
    assert main([*command, f"--site={federation.site[1]}", "--output=site"]) == 0
    assert main([*command, str(federation.run.folder), "--client=1", "--output=run"]) == 0
    ours, theirs = (safetensors.load_file(f"{name}/model.safetensors") for name in ("site", "run"))
    assert is_equal(ours, theirs)


@pytest.mark.parametrize(("rule", "role"), [("true", LOCAL), ("null", ENSEMBLE)])  # few samples are no evidence
def test_site_uses_the_model_that_it_deploys(
    rule: str, role: str, federations: Callable[..., Federation], images: Path, tmp_path: Path
) -> None:
    federation = federations(
        *("--method=ProxyEnsemble", "--method.proxy_epochs=1", "--method.finetune_epochs=1", "--rounds=1"),
        f"--do_no_harm={rule}",
    )
    output = tmp_path / "out.csv"
    run = open_run("test", federation.run.folder)
    for number, client in enumerate(run.clients):
        site = ["--site", str(federation.site[number])]
        trained = open_site("test", federation.site[number])
        assert trained.clients[0].deployed_role == client.deployed_role == role
        assert trained.local_rounds.get(number) == run.local_rounds.get(number) == (1 if role == LOCAL else None)
        comparison = trained.records[number].comparison
        assert (None if comparison is None else comparison.deployed) == (LOCAL if role == LOCAL else None)
        predict = ["predict", *site, f"--input={images}", f"--output={output}"]
        assert main(predict) == 0
        x = torch.from_numpy(np.load(images)["images"])[:, None].float() / 127.5 - 1
        with torch.no_grad():
            labels = client.deployed_model.eval()(x).argmax(1).tolist()
        assert [int(row["label"]) for row in rows(output)] == labels
        assert main(["test", *site]) == 0


def test_predict_members_are_the_votes_of_the_ensemble(
    federations: Callable[..., Federation], images: Path, tmp_path: Path
) -> None:
    federation = federations("--method=ProxyEnsemble", "--method.proxy_epochs=1", *EXITS)
    output, site = tmp_path / "out.csv", ["--site", str(federation.site[0])]
    assert main(["calibrate", *site, "--target_risk=0.9", "--mode=empirical"]) == 0
    assert main(["predict", *site, f"--input={images}", f"--output={output}", "--members=true"]) == 0
    [client] = open_site("test", federation.site[0]).clients
    assert client.serving is not None
    predictions = pd.read_csv(output)
    assert list(predictions)[4:] == [f"label_{member}" for member in client.serving.members]
    assert set(predictions["exit"]) == {1, 2}
    x = torch.from_numpy(np.load(images)["images"])[:, None].float() / 127.5 - 1
    for member, offset in zip(client.serving.members, client.serving.offsets, strict=True):
        with torch.no_grad():
            logits = client.networks[member].eval()(x)
        votes = [(part + offset).argmax(1) for part in (logits if isinstance(logits, list) else [logits])]
        exits = (predictions["exit"] - 1).clip(upper=len(votes) - 1)
        assert predictions[f"label_{member}"].tolist() == [int(votes[exit_][row]) for row, exit_ in enumerate(exits)]


def test_site_regression_of_a_table_predicts_values_of_its_own_file(
    tmp_path: Path, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_csv(str(SOURCES["heart_disease"].load))
    table = table[table["site"] == "hungarian"].drop(columns="site").dropna(subset=["chol"])
    table.to_csv(tmp_path / "stored", index=False)
    (tmp_path / "own.csv").symlink_to("stored")  # the link has the suffix
    mlp = "{class_path: fedekd.models.MLP, init_args: {hidden: [8]}}"
    options = [
        *(f"--client.private_model={mlp}", f"--client.proxy_model={mlp}", "--data.target_column=chol"),
        *("--task=regression", "--trainer.accelerator=cpu", "--rounds=1", "--client.local_epochs=1"),
    ]
    monkeypatch.chdir(tmp_path)
    network = SiteParts.from_options(options, 1, 3, "own.csv").spec.build_model("private", "server")
    torch.save(network.state_dict(), "weights.pt")
    options.append("--client.private_weights=weights.pt")
    finish(Site(options, 1, 3, tmp_path / "folder", data="own.csv", name="Budapest"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["predict", "--site", "../folder", "--input", "../own.csv"]) == 0
    values = [float(row["value"]) for row in rows(Path("predictions.csv"))]
    [client] = open_site("test", tmp_path / "folder").clients
    assert (client.number, client.splits.name) == (1, "Budapest")
    expected = client.in_target_unit(client.predict("private", "test", mixed=False).output)[:, 0].tolist()
    assert [values[row] for row in client.splits.test.tolist()] == pytest.approx(expected, rel=1e-5)
    assert main(["test", "--site", "../folder"]) == 0
    table.drop(columns="age").to_csv("less.csv", index=False)
    assert main(["predict", "--site", "../folder", "--input", "less.csv"]) == 2
    assert "expected the columns of the training data, got none named age" in error_line()
    assert main(["predict", "--site", "../folder", "--input", "../own.csv", "--probabilities=true"]) == 2
    assert "--probabilities: expected false for regression, got True" in error_line()
    assert main(["predict", "--site", "../folder", "--input", "../own.csv", "--members=true"]) == 2
    assert (
        "--members: expected false for site 'Budapest', whose private model is a single network, got True"
        in error_line()
    )
    table.iloc[1:].to_csv("../own.csv", index=False)
    assert main(["predict", "--site", "../folder", "--input", "less.csv"]) == 2
    assert "--site: ../folder/site-001: expected the samples of the training, got others. Restore" in error_line()


@pytest.mark.parametrize("data", [["--data.dataset=blobs.npz"], ["--data.dataset=blobs", "--data.root=."]])
def test_site_config_with_relative_paths_opens_in_another_folder(
    data: list[str],
    options: list[str],
    write_blobs: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write_blobs(tmp_path / "blobs.npz")
    monkeypatch.chdir(tmp_path)
    parts = SiteParts.from_options([*options, *data], 1, 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened = SiteParts.from_config(parts.config, 1, 3, None, None)
    assert opened.splits.digest(opened.samples) == parts.splits.digest(parts.samples)


def test_site_stored_images_with_other_times_are_named_in_the_error(tmp_path: Path, options: list[str]) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / f"scans/{'well' if number % 2 else 'sick'}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    finish(Site([*options, "--rounds=1", "--data.memory_limit=0"], 0, 3, tmp_path, data=str(tmp_path / "scans")))
    os.utime(path, (0, 0))
    with pytest.raises(UserError, match="got others, or files with other modification times"):
        open_site("test", tmp_path)


def test_site_of_unfinished_run_raises_one_line(sites: Sites, images: Path, error_line: Callable[[], str]) -> None:
    with pytest.raises(ServerStoppedError):
        sites.server(observer=RecordingObserver(stop_after=1)).run()
    folder = sites.folder / "hospital-1"
    for command in (["predict", f"--input={images}"], ["calibrate"], ["test"]):
        assert main([*command, "--site", str(folder)]) == 2
        assert "--site: expected a site of a finished run, got an unfinished one in" in error_line()
    shutil.copytree(folder / "site-001", folder / "site-002")
    assert main(["test", "--site", str(folder)]) == 2
    assert "expected the folder of one site, got" in error_line()
    assert main(["test", "--site", str(images)]) == 2
    assert "expected the folder of a site of a Flower run" in error_line()


def test_site_next_run_replaces_the_training_at_its_last_round(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    finish(Site([*options, "--rounds=1"], 1, 3, folder))
    old = open_site("test", folder)
    other = Site([*options, "--rounds=1", "--seed=1"], 1, 3, folder)
    proxy = other.spec.build_model("proxy", "server").state_dict()
    other.reply(Message(pack({"round": 0, "version": 0, "comparison": None}, proxy), 5, ROUND))
    # The same federation, started again, removes the state of its first last round.
    again = Site([*options, "--rounds=1"], 1, 3, folder)
    again.reply(Message(pack({"round": 0, "version": 0, "comparison": None}, proxy), 5, ROUND))
    assert is_equal(open_site("test", folder).clients[0].state_dict(), old.clients[0].state_dict())
    finish(other)
    new = open_site("test", folder)
    assert new.spec.seed == 1
    assert not is_equal(new.clients[0].state_dict(), old.clients[0].state_dict())


def test_site_damaged_training_is_named_and_not_replaced_by_an_earlier_one(options: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        finish(Site([*options, "--rounds=1"], 1, 3, tmp_path))
    newest = max((tmp_path / "site-001/trained").glob("states-*.bin"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.raises(UserError, match=r"site-001/trained is damaged: .*states-0002\.bin does not match") as caught:
        open_site("predict", tmp_path)
    assert "\n" not in str(caught.value)


#: Code of a process that loads a site, and whose children write other weights and kill themselves at an event.
VICTIM = """
import os, pathlib, signal
import torch
from fedekd.configuration.trained import open_site, save_site
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.configuration.site_parts import SiteParts

trained = open_site("test", pathlib.Path(folder))
[client] = trained.clients
config = CheckpointStore(trained.folder / "trained").notes()["config"]
parts = SiteParts.from_config(config, client.number, trained.spec.num_clients, None, client.splits.name)
result = trained.records[client.number]
for tensor in client.networks["private"].parameters():
    tensor.data.zero_()

def wrap(owner, name, kind):
    real = getattr(owner, name)
    def wrapper(*arguments, **options):
        global left
        if event == kind:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(owner, name, wrapper)

event, count = moment.split(":")
left = int(count)
wrap(os, "fsync", "fsync")
wrap(pathlib.Path, "replace", "replace")
wrap(pathlib.Path, "unlink", "unlink")
save_site(trained.folder, parts, client, result, None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "has_new"),
    [("fsync:1", False), ("replace:1", False), ("fsync:2", False), ("replace:2", False), ("unlink:1", True)],
)
def test_site_killed_while_it_writes_keeps_the_old_training_or_the_new(
    moment: str, has_new: bool, options: list[str], tmp_path: Path
) -> None:
    site = Site([*options, "--rounds=1"], 1, 3, tmp_path)
    for _ in range(3):  # the third one removes the files of the first
        finish(site)
    context = get_context("forkserver")
    context.set_forkserver_preload(["fedekd.configuration.trained"])
    victim = context.Process(target=exec, args=(VICTIM, {"moment": moment, "folder": str(tmp_path)}))
    victim.start()
    victim.join(300)
    assert victim.exitcode == -9
    parameters = list(open_site("test", tmp_path).clients[0].networks["private"].parameters())
    assert all(not tensor.any() for tensor in parameters) == has_new
    finish(site)
    assert all(
        tensor.any() for tensor in list(open_site("test", tmp_path).clients[0].networks["private"].parameters())[:1]
    )
