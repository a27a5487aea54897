"""External teacher of SafeKD: files of weights, the loss, and runs with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from fedekd.benchmark import Block, cells
from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.federation import MultiProcess, RoundOptions
from fedekd.federation.checkpoint import pack
from fedekd.flower.description import require_agreement, shared_config
from fedekd.methods import ClientOptions, SafeKD
from fedekd.methods.teacher import ExternalTeacher
from fedekd.models import PrivateCNN, ProxyCNN
from fedekd.modules import MultiExitModule
from tests.federation.runs import StopAfter, StoppedError, assert_equal_weights, contents, weights

from .conftest import Federate, make_spec

SMALL = {"class_path": "fedekd.models.ProxyCNN"}
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def client(**values: Any) -> ClientOptions:
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    return ClientOptions(**{"local_epochs": 1, "private_model": SMALL, "optimizer": optimizer, "exits": 2, **values})


def saved(path: Path, network: nn.Module | None = None, seed: int = 0) -> dict[str, Any]:
    """Write the weights of a network and return the option `teacher`."""
    torch.manual_seed(seed)
    network = network or PrivateCNN(1, 8, 3)
    path.write_bytes(pack(network.state_dict()))
    return {"class_path": type(network).__name__, "weights": str(path)}


class Exploit:
    """Object whose pickle would create a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def literal_loss(exits: list[Tensor], teacher: Tensor, labels: Tensor, t: float, beta: float) -> Tensor:
    """Loss of SAFE-KD with a = b = 1 and w = 1 / E, sample by sample (DKD: Zhao et al., Eq. 7)."""
    kl = lambda p, q: sum(a * (a / b).log() for a, b in zip(p, q, strict=True))  # noqa: E731
    total = torch.zeros((), dtype=torch.float64)
    for e, logits in enumerate(exits):
        for row, guide, deep, y in zip(logits, teacher, exits[-1].detach(), labels.tolist(), strict=True):
            p, q, d = ((values / t).exp() / (values / t).exp().sum() for values in (guide, row, deep))
            rest_p, rest_q = 1 - p[y], 1 - q[y]
            others = [c for c in range(len(p)) if c != y]
            dkd = kl([p[y], rest_p], [q[y], rest_q])
            dkd = dkd + beta * kl([p[c] / rest_p for c in others], [q[c] / rest_q for c in others])
            total = total - (row[y].exp() / row.exp().sum()).log() + t**2 * dkd
            if e < len(exits) - 1:
                total = total + t**2 * kl(d, q)
    return total / len(exits) / len(labels)


def test_external_teacher_loss_of_precomputed_outputs_equals_literal_transcription(
    federate: Federate, tmp_path: Path
) -> None:
    run = federate(SafeKD(teacher=saved(tmp_path / "t.pt"), dkd_beta=2.0), client=client(), precision="64-true")
    trained: Any = run.engine.client(0)  # type: ignore[attr-defined]
    teacher = run.method.teacher.build(run.spec)  # type: ignore[attr-defined]
    [outputs] = trained.teacher_outputs(teacher)
    assert outputs.dtype == torch.float64
    rows = trained.splits.train[:6]
    x, y = (trained.samples.inputs[rows].double() - 127.5) / 127.5, trained.samples.labels[rows]
    student = trained.networks["private"]
    module = MultiExitModule(student, teacher, dkd_beta=2.0, warmup_epochs=0)
    expected = literal_loss(student(x), teacher(x), y, 4.0, 2.0)
    torch.testing.assert_close(module.training_step((x, y, outputs[:6]), 0), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(module.training_step((x, y), 0), expected, rtol=1e-9, atol=1e-10)


def test_build_plain_weights_equal_the_network(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = ProxyCNN(1, 8, 3)
    teacher = ExternalTeacher.from_config(saved(tmp_path / "t.pt", network)).build(make_spec())
    torch.testing.assert_close(teacher(IMAGES), network(IMAGES))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_build_network_with_exits_keeps_the_last_exit(tmp_path: Path) -> None:
    spec = make_spec(client=client(private_model={"class_path": "fedekd.models.PrivateCNN"}, exits=3, exit_grid=2))
    network = spec.build_model("private", 2)
    value = {**saved(tmp_path / "t.pt", network), "class_path": "PrivateCNN"}
    teacher = ExternalTeacher.from_config(value).build(spec)
    torch.testing.assert_close(teacher(IMAGES), network(IMAGES)[-1])


def test_build_torchvision_weights_of_the_plain_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = resnet18(num_classes=3).eval()
    (tmp_path / "r.pt").write_bytes(pack(network.state_dict()))
    value = {"class_path": "torchvision.models.resnet18", "weights": str(tmp_path / "r.pt")}
    teacher = ExternalTeacher.from_config(value).build(make_spec(input_shape=(1, 32, 32)))
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(teacher(images), network(images.expand(-1, 3, -1, -1)))


def _wrong_files(folder: Path) -> dict[str, tuple[Any, str]]:
    """Return values of the option and the words of their errors."""
    torch.manual_seed(0)
    states: dict[str, Any] = {
        "classes": PrivateCNN(1, 8, 5).state_dict(),
        "shape": PrivateCNN(3, 8, 3).state_dict(),
        "fewer": dict(list(PrivateCNN(1, 8, 3).state_dict().items())[:-1]),
        "more": {**PrivateCNN(1, 8, 3).state_dict(), "extra": torch.zeros(1)},
        "nan": {name: tensor * float("nan") for name, tensor in PrivateCNN(1, 8, 3).state_dict().items()},
        "list": [torch.zeros(1)],
        "nested": {"model": PrivateCNN(1, 8, 3).state_dict(), "epoch": 3},
        "unsafe": {"weight": Exploit(folder / "harm")},
    }
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
    (folder / "noise.pt").write_bytes(b"no weights at all")
    words = {
        "classes": "expected a network of 3 classes, as in the data, got one of 5",
        "shape": r"convolutions.0.weight of shape \(64, 1, 3, 3\) for PrivateCNN, got \(64, 3, 3, 3\)",
        "fewer": "without 'head.bias'",
        "more": "also has 'extra'",
        "nan": "expected finite values",
        "list": "expected a state_dict, got",
        "nested": "with model, epoch",
        "unsafe": "with objects other than tensors",
        "noise": "expected tensors, which torch.load reads",
        "missing": "which does not exist",
    }
    return {
        name: ({"class_path": "PrivateCNN", "weights": f"{folder}/{name}.pt"}, text) for name, text in words.items()
    }


def test_teacher_wrong_file_raises_one_line_user_error(federate: Federate, tmp_path: Path) -> None:
    for value, words in _wrong_files(tmp_path).values():
        with pytest.raises(UserError, match=words) as error:
            federate(SafeKD(teacher=value), client=client()).run()
        assert str(error.value).startswith("method.teacher.weights: expected ")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 390
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"class_path": "PrivateCNN"},
            "expected a file, because PrivateCNN .* has random weights, got None",
        ),
        ({"weights": "t.pt"}, "teacher: expected class_path"),
        ({"class_path": "PrivateCNN", "file": "t.pt"}, "teacher: expected class_path"),
        ({"class_path": "PrivateCNN", "weights": 3}, r"teacher\.weights: expected a path or null, got 3"),
        ({"class_path": "NoSuchNet"}, "teacher: expected a model of fedekd.models, got 'NoSuchNet'"),
    ],
)
def test_teacher_wrong_value_raises_user_error(value: dict[str, Any], words: str, federate: Federate) -> None:
    with pytest.raises(UserError, match=words):
        federate(SafeKD(teacher=value), client=client()).run()
    with pytest.raises(UserError, match="teacher: expected null with distillation_weight 0"):
        SafeKD(distillation_weight=0, teacher=value)


def test_fit_wrong_teacher_exits_2_with_one_line(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = [f"--method.teacher.{name}={value}" for name, value in _wrong_files(tmp_path)["classes"][0].items()]
    options = ["--data.num_clients=3", "--rounds=1", "--client.exits=2", "--trainer.accelerator=cpu", "--logger=null"]
    assert main(["fit", f"--data.dataset={npz}", "--method=SafeKD", *options, *teacher, "--output=run"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: method.teacher.weights: expected a network of 3 classes")
    assert text.count("\n") == 1
    assert not (tmp_path / "run").exists() or not [*(tmp_path / "run").iterdir()]


def test_safekd_with_teacher_resumes_and_refuses_other_weights(federate: Federate, tmp_path: Path) -> None:
    value, rounds = saved(tmp_path / "t.pt"), RoundOptions(rounds=3)
    run: Callable[..., Any] = lambda name, **parts: federate(  # noqa: E731
        SafeKD(teacher=value, warmup_epochs=0), client=client(), rounds=rounds, output=tmp_path / name, **parts
    )
    whole = run("whole")
    whole.run()
    with pytest.raises(StoppedError):
        run("cut", observer=StopAfter(phases=12)).run()
    again = run("cut")
    again.run()
    assert_equal_weights(weights(whole), weights(again))
    assert {role for each in whole.engine.clients.values() for role in each.state_dict()["networks"]} == {"private"}
    saved(tmp_path / "t.pt", seed=1)
    with pytest.raises(UserError, match=r"method\.SafeKD\.teacher\.sha256: expected the saved value"):
        run("cut").load_clients()
    with pytest.raises(UserError, match="expected the file with SHA-256"):  # replaced while the run goes on
        whole.method.teacher.build(whole.spec)


def test_safekd_teacher_changes_weights_and_runs_once_per_phase(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = "fedekd.modules.objective_module.teacher_forward"
    monkeypatch.setattr(forward, lambda *arguments: calls.append(1))
    runs = []
    for seed in (0, 1):
        value = saved(tmp_path / f"{seed}.pt", seed=seed)
        runs.append(federate(SafeKD(teacher=value, warmup_epochs=0), client=client()))
        runs[-1].run()
    assert not calls
    first, second = map(weights, runs)
    assert any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_safekd_with_teacher_in_processes_equals_sequential(federate: Federate, tmp_path: Path) -> None:
    value = saved(tmp_path / "t.pt")
    runs = [
        federate(SafeKD(teacher=value, warmup_epochs=0), client=client(), engine=engine, output=tmp_path / name)
        for name, engine in (("one", None), ("two", MultiProcess(2)))
    ]
    summaries = [run.run() for run in runs]
    assert summaries[0]["clients"] == summaries[1]["clients"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_sites_with_other_weights_are_refused(federate: Federate, tmp_path: Path) -> None:
    configs = []
    for seed in (0, 1):
        value = saved(tmp_path / "t.pt", seed=seed)
        run = federate(SafeKD(teacher=value), client=client())
        configs.append(shared_config(run.method, run.spec))
    with pytest.raises(UserError, match=r"site 1: method\.SafeKD\.teacher\.sha256: expected"):
        require_agreement({"site": 1, "config": configs[1]}, configs[0])


def test_key_of_a_grid_has_the_content_of_the_weights(tmp_path: Path) -> None:
    def key(value: Any) -> str:
        method = {"class_path": "SafeKD", "init_args": {"teacher": value}}
        return cells([Block(["digits"], [0.1], [0], {"x": method})])[0].key

    first, copy = saved(tmp_path / "a.pt"), saved(tmp_path / "b.pt")
    other = saved(tmp_path / "c.pt", seed=1)
    assert len({key(None), key(first), key(other)}) == 3
    assert key(first) == key(copy)
    plain = cells([Block(["digits"], [0.1], [0], {"x": {"class_path": "SafeKD"}})])[0].key
    assert key(None) == plain
