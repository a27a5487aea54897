"""Command `predict`, in this process."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedekd.atomic import seal_json, unseal_json
from fedekd.cli import main
from fedekd.configuration.load_run import open_finished
from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.scoring import network_input

FAST = ["--client.local_epochs=1", "--trainer.accelerator=cpu", "--trainer.threads=1", "--logger=null", "--quiet"]


def fit(npz: Path, output: str, *options: str, clients: int = 1) -> int:
    data = [f"--data.dataset={npz}", f"--data.num_clients={clients}", "--data.alpha=50", "--data.batch_size=16"]
    return main(["fit", *FAST, *data, "--rounds=2", f"--output={output}", "--client.optimizer.lr=0.002", *options])


SAFE = ("--method=SafeKD", "--client.exits=2")
RNG = np.random.default_rng(5)
IMAGES = (RNG.integers(0, 80, (150, 8, 8)) + 80 * (np.arange(150) % 3)[:, None, None]).astype(np.uint8)
NOISE = RNG.integers(0, 256, (150, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def ready(write_blobs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of one client and of two; the first one calibrated."""
    folder = tmp_path_factory.mktemp("predict")
    npz = write_blobs(folder / "blobs.npz", num_samples=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fedekd.federation.RunFolder.write_figures", lambda *arguments: None)
        assert fit(npz, "one", *SAFE) == 0
        assert fit(npz, "two", *SAFE, "--seed=1", clients=2) == 0
        assert main(["calibrate", "one", "--target_risk", "0.3", "--confidence", "0.7"]) == 0
        np.savez("images.npz", images=IMAGES)
    return folder


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """A folder with copies of all that."""
    shutil.copytree(ready, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def rows(path: str = "predictions.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def network_of(run: str):
    federation, *_ = open_finished("test", Path(run), in_process=True)
    return federation.load_clients()[0].networks["private"]


def batches(run: str, images: np.ndarray = IMAGES):
    network = network_of(run)
    return network, [network_input(network, part) for part in torch.from_numpy(images)[:, None].split(128)]


def test_predict_rows_equal_policy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "one", "--input", "images.npz", "--output", "deep/out.csv"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = rows("deep/out.csv")
    assert Path("deep/out.csv").read_text().splitlines()[0] == "image,label,exit,score"
    assert [row["image"] for row in found] == [str(place) for place in range(150)]
    policy = ExitPolicy.load(Path("one/exits/client-000.json"))
    network, parts = batches("one")
    outputs = [policy.predict_with_exits(network, x) for x in parts]
    labels = torch.cat([each.logits.argmax(1) for each in outputs]).tolist()
    exits = torch.cat([each.exits for each in outputs]).tolist()
    scores = torch.cat([each.scores for each in outputs]).tolist()
    assert [int(row["label"]) for row in found] == labels
    assert [int(row["exit"]) - 1 for row in found] == exits
    assert [float(row["score"]) for row in found] == pytest.approx(scores, abs=1e-6)
    assert len(set(labels)) > 1
    assert 0 in exits
    assert f"150 images (exit 1: {exits.count(0) / 150:.1%}" in printed.out
    assert "written to deep/out.csv" in printed.out
    assert [path.name for path in Path("deep").iterdir()] == ["out.csv"]


def test_predict_without_policy_uses_last_exit_and_warns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("one/exits")
    np.savez("images.npz", images=NOISE)
    assert main(["predict", "one", "--input", "images.npz"]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: client 0 has no exit policy, all samples take the last exit")
    assert warning.count("\n") == 1
    network, parts = batches("one", NOISE)
    with torch.no_grad():
        first, logits = (torch.cat(each) for each in zip(*(network.eval()(x) for x in parts), strict=True))
    assert not torch.equal(first.argmax(1), logits.argmax(1))  # the exits differ
    assert [int(row["label"]) for row in rows()] == logits.argmax(1).tolist()
    assert {row["exit"] for row in rows()} == {"2"}
    expected = logits.softmax(1).amax(1).tolist()
    assert [float(row["score"]) for row in rows()] == pytest.approx(expected, abs=1e-6)


def test_predict_network_without_exits_prints_no_warning(
    here: Path, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(ready / "blobs.npz", "plain", "--method=Local") == 0
    capsys.readouterr()
    assert main(["predict", "plain", "--input", "images.npz"]) == 0
    assert capsys.readouterr().err == ""
    assert {row["exit"] for row in rows()} == {"1"}
    accuracy = np.mean([int(row["label"]) for row in rows()] == np.arange(150) % 3)
    assert accuracy > 0.4


def test_predict_uses_the_selected_client(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for client in "01":
        assert main(["predict", "two", "--input", "images.npz", "--client", client, "--output", f"{client}.csv"]) == 0
    assert [row["score"] for row in rows("0.csv")] != [row["score"] for row in rows("1.csv")]


def test_predict_concatenates_splits_in_order(here: Path) -> None:
    np.savez("splits.npz", train_images=IMAGES[:100], test_images=IMAGES[100:], train_labels=np.zeros(5))
    assert main(["predict", "one", "--input", "splits.npz"]) == 0
    whole = Path("predictions.csv").read_bytes()
    assert main(["predict", "one", "--input", "images.npz"]) == 0
    assert Path("predictions.csv").read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "predict: expected RUN or --site FOLDER, got none"),
        (["--input", "images.npz"], "predict: expected RUN or --site FOLDER, got none"),
        (["one", "--site", "two", "--input", "images.npz"], "predict: expected RUN or --site FOLDER, got both"),
        (
            ["--site", "two", "--input", "images.npz"],
            "predict: --site: expected the folder of a site of a Flower run, got",
        ),
        (["one"], "--input: expected a file or folder, got none"),
        (["one", "--input", "none.npz"], "--input: file 'none.npz' not found"),
        (["one", "--input", "one"], "--input: expected an .npz file; hf:NAME"),
        (["elsewhere", "--input", "images.npz"], "predict: expected the folder of a run, got 'elsewhere'"),
        (["two", "--input", "images.npz"], "--client: expected 0..1, got none"),
        (["two", "--input", "images.npz", "--client", "2"], "--client: expected 0..1, got '2'"),
        (["one", "--input", "images.npz", "--client", "-1"], "--client: expected 0, got '-1'"),
        (
            ["one", "--input", "images.npz", "--output", "two"],
            "--output: expected the name of a .csv or .parquet file, got 'two'",
        ),
        (
            ["one", "--input", "images.npz", "--output", ""],
            "--output: expected the name of a .csv or .parquet file, got ''",
        ),
        (["one", "--input", "images.npz", "--output", "blobs.npz/x.csv"], "blobs.npz"),
        (["one", "--input", "images.npz", "--otput", "x.csv"], "--otput"),
        (
            ["one", "--input", "images.npz", "--members", "true", "--label_prior", "uniform"],
            "--members: expected false with --label_prior",
        ),
        (
            ["one", "--input", "wide.npz"],
            "--input: expected images of (1, 8, 8) (channels, height, width), got (1, 8, 9)",
        ),
        (["one", "--input", "color.npz"], "(channels, height, width), got (3, 8, 8)"),
        (
            ["one", "--input", "deep.npz"],
            "--input: expected images with 8 bits, as in training, got 16-bit or floating",
        ),
        (["one", "--input", "real.npz"], "images of 'real.npz': expected float32 values in 0..1, got 255\n"),
        (["one", "--input", "cut.npz"], "--input: 'cut.npz' cannot be read"),
        (["one", "--input", "other.npz"], "--input: 'other.npz': expected an array images"),
    ],
)
def test_predict_invalid_option_prints_one_line_error(
    arguments: list[str], words: str, here: Path, error_line: Callable[[], str]
) -> None:
    np.savez("wide.npz", images=np.zeros((2, 8, 9), np.uint8))
    np.savez("color.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez("deep.npz", images=IMAGES[:2].astype(np.uint16) * 257)
    np.savez("real.npz", images=np.full((2, 8, 8), 255, np.float32))
    np.savez("other.npz", pictures=IMAGES)
    Path("cut.npz").write_bytes(Path("images.npz").read_bytes()[:3000])
    before = sorted(here.rglob("*"))
    assert main(["predict", *arguments]) == 2
    assert words in error_line()
    assert sorted(here.rglob("*")) == before


def write_files(folder: Path, classes: Sequence[str] = ("0", "1", "2")) -> list[str]:
    """Write IMAGES as files and return their names in sorted order."""
    names = [f"{classes[i % 3]}/{i:03d}.png" for i in range(len(IMAGES))]
    for name, image in zip(names, IMAGES, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return sorted(names)


def test_predict_reads_folders_and_manifests_with_names_of_files(here: Path) -> None:
    names = write_files(here / "new")
    order = [int(name[2:5]) for name in names]
    assert main(["predict", "one", "--input", "images.npz"]) == 0
    expected = rows()
    assert main(["predict", "one", "--input", "new"]) == 0
    assert Path("predictions.csv").read_text().startswith("image,file,label,exit,score\n0,0/000.png,")
    found = rows()
    assert [row["file"] for row in found] == names
    assert [row["label"] for row in found] == [expected[index]["label"] for index in order]
    Path("new.csv").write_text("\n".join(["path", *(f"new/{name}" for name in names)]))
    assert main(["predict", "one", "--input", "new.csv"]) == 0
    assert [{**row, "file": row["file"].removeprefix("new/")} for row in rows()] == found


def test_predict_of_a_run_on_a_folder_resizes_and_names_classes(
    here: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    write_files(here / "train", ("ant", "bee", "cat"))
    assert fit(here / "train", "named", "--method=Local", "--data.image_size=[10,9]") == 0
    capsys.readouterr()
    assert main(["predict", "named", "--input", "images.npz"]) == 0
    assert {(row["label"], row["class"]) for row in rows()} <= {("0", "ant"), ("1", "bee"), ("2", "cat")}
    assert main(["predict", "named", "--input", "train"]) == 0
    assert len(rows()) == 150
    capsys.readouterr()
    np.savez("color.npz", images=np.zeros((2, 12, 12, 3), np.uint8))
    assert main(["predict", "named", "--input", "color.npz"]) == 2
    assert "expected images of (1, 10, 9) (channels, height, width), got (3, 10, 9)" in error_line()


def test_predict_unreadable_image_is_an_error_also_if_training_left_such_out(
    here: Path, capsys: pytest.CaptureFixture[str], error_line: Callable[[], str]
) -> None:
    write_files(here / "train", ("ant", "bee", "cat"))
    assert fit(here / "train", "lenient", "--method=Local", "--data.skip_unreadable=true") == 0
    write_files(here / "new")
    (here / "new" / "0" / "scan.png").write_bytes(b"no image")
    Path("predictions.csv").unlink(missing_ok=True)
    capsys.readouterr()
    assert main(["predict", "lenient", "--input", "new"]) == 2
    assert error_line() == (
        "error: --input: image '0/scan.png' cannot be read (not an image). Replace or remove it, or set"
        " --skip_unreadable true\n"
    )
    assert not Path("predictions.csv").exists()
    assert main(["predict", "lenient", "--input", "new", "--skip_unreadable", "true"]) == 0
    assert "--skip_unreadable: 1 of 151 images cannot be read" in capsys.readouterr().err
    assert len(rows()) == 150


def test_predict_policy_of_other_network_raises(here: Path, error_line: Callable[[], str]) -> None:
    Path("two/exits").mkdir()
    shutil.copy("one/exits/client-000.json", "two/exits/client-001.json")
    assert main(["predict", "two", "--input", "images.npz", "--client", "1"]) == 2
    assert "exit policy: expected the network" in error_line()
    assert not Path("predictions.csv").exists()
    values = unseal_json(Path("one/exits/client-000.json").read_bytes())
    values |= {name: [values[name][0], *values[name]] for name in ("thresholds", "search_bounds", "certified")}
    Path("one/exits/client-000.json").write_bytes(seal_json(values))
    assert main(["predict", "one", "--input", "images.npz"]) == 2
    assert "exit policy: expected a network with 3 exits, got 2" in error_line()


def test_predict_damaged_policy_keeps_existing_output(here: Path, error_line: Callable[[], str]) -> None:
    Path("predictions.csv").write_text("kept\n")
    path = Path("one/exits/client-000.json")
    path.write_text(path.read_text()[:-30])
    assert main(["predict", "one", "--input", "images.npz"]) == 2
    assert "one/exits/client-000.json: exit policy: invalid content" in error_line()
    assert Path("predictions.csv").read_text() == "kept\n"


def test_predict_regression_writes_values(here: Path, ready: Path) -> None:
    assert fit(ready / "blobs.npz", "grades", "--method=Local", "--task=regression") == 0
    assert main(["predict", "grades", "--input", "images.npz"]) == 0
    assert list(rows()[0]) == ["image", "value", "exit"]
    network, parts = batches("grades")
    with torch.no_grad():
        values = torch.cat([network.eval()(x) for x in parts])[:, 0].tolist()
    assert [float(row["value"]) for row in rows()] == pytest.approx(values, rel=1e-5)


def test_predict_unfinished_run_raises(here: Path, error_line: Callable[[], str]) -> None:
    Path("one/summary.json").unlink()
    assert main(["predict", "one", "--input", "images.npz"]) == 2
    assert "expected a finished run, got one, which is not. Go on with: fit --resume one" in error_line()
    assert not Path("predictions.csv").exists()


def test_predict_empty_splits_raise(here: Path, error_line: Callable[[], str]) -> None:
    nothing = np.zeros((0, 8, 8), np.uint8)
    np.savez("none.npz", train_images=nothing, test_images=nothing)
    assert main(["predict", "one", "--input", "none.npz"]) == 2
    assert "none.npz" in error_line()


def test_predict_write_failure_leaves_no_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, error_line: Callable[[], str]
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(here.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", refuse)
        assert main(["predict", "one", "--input", "images.npz"]) == 2
    assert "no space left on the disk" in error_line()
    assert sorted(here.rglob("*")) == before
