"""A local baseline is reused only if everything that decides its numbers is unchanged."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

import fedekd
from fedekd.data import FederatedDataModule
from fedekd.federation import baseline_key as key_module
from fedekd.federation import source_code
from fedekd.federation.baseline_key import TRAINING_CODE, baseline_key
from fedekd.federation.local_baseline import restore_local_baseline, train_local_baseline
from fedekd.federation.source_code import RESULT_CODE, SourceUnavailableError, code_of
from fedekd.methods import Client, ClientOptions, Local
from fedekd.modules import TrainerFactory

from .conftest import Federate, Recorder

ROOT = Path(fedekd.__file__).parent

#: Imports of the training code that are not hashed, and the reason.
HASHED_OTHERWISE = {
    "data": "the samples themselves are part of the key",
    "methods/base.py": "abstract hooks",
    "atomic.py": "writes downloads, whose content is verified",
    "errors.py": "raised before training",
    "child_process.py": "lifetime of the processes that read inputs",
    "class_paths.py": "imports transforms, whose class paths are part of the key",
    "tasks.py": "two names of tasks",
}

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self, in_channels, image_size, num_classes):
        super().__init__()
        self.head = torch.nn.Linear(in_channels * 64, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))
"""


def imports(path: Path) -> Iterator[Path]:
    """Files of fedekd that a file imports, through the re-exports of packages."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedekd"):
            for alias in node.names:
                yield from defining(str(node.module), alias.name)


def defining(module: str, name: str) -> Iterator[Path]:
    """Files that define a name of a module."""
    place = ROOT.parent / module.replace(".", "/")
    if (file := place.with_suffix(".py")).exists():
        yield file
        return
    if (package := place / name).is_dir():
        yield from package.glob("*.py")
        return
    for node in ast.walk(ast.parse((place / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            yield from defining(str(node.module), name)


def test_training_code_lists_every_import_of_training() -> None:
    found, waiting = set[Path](), [ROOT / f"methods/{name}.py" for name in ("client", "local")]
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += imports(path)
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    assert "modules/objective_module.py" in names  # through methods/client.py and modules/__init__.py
    assert "functional/precision.py" in names
    known = (*TRAINING_CODE, *HASHED_OTHERWISE)
    assert [name for name in names if not any(name == one or name.startswith(f"{one}/") for one in known)] == []


def test_code_lists_name_existing_files() -> None:
    assert all((ROOT / part).exists() for part in (*TRAINING_CODE, *RESULT_CODE))


@pytest.fixture
def new_key(federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that writes files of a user's code, and returns the key as a new process would compute it."""
    monkeypatch.syspath_prepend(tmp_path / "code")

    def key(
        files: Mapping[str, str], model: str = "own.model.Net", trainer: TrainerFactory | None = None, **options: Any
    ) -> str:
        for name, content in files.items():
            (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "code" / name).write_text(content)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("own", "helpers")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        client = ClientOptions(private_model={"class_path": model}, **options)
        return key_of(federate(Local(), client=client, **({} if trainer is None else {"trainer": trainer})))

    return key


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], types.ModuleType]:
    """A function that imports a module of the test's folder; it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def load_module(name: str) -> types.ModuleType:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        del sys.modules[name]
        return importlib.import_module(name)

    return load_module


def client_of(orchestrator: Any) -> Client:
    client: Client = orchestrator.engine.client(0)
    return client


def key_of(orchestrator: Any) -> str:
    return baseline_key(client_of(orchestrator))


@pytest.mark.parametrize(
    ("files", "changed"),
    [
        ({"own/model.py": f"import helpers\n{MODEL}"}, "helpers.py"),
        ({"own/model.py": f"from helpers import gain\n{MODEL}"}, "helpers.py"),
        (
            {"own/model.py": f"from own.deep import first\n{MODEL}", "own/deep.py": "from . import second as first"},
            "own/second.py",
        ),
        ({"own/model.py": f"from . import part\n{MODEL}"}, "own/part.py"),
        ({"own/model.py": f"from .part import *\n{MODEL}", "own/part.py": "from .rest import *"}, "own/rest.py"),
        (
            {"own/model.py": f"from .sub import *\n{MODEL}", "own/sub/__init__.py": "__all__ = ['late']"},
            "own/sub/late.py",
        ),
        ({"own/model.py": f"def late():\n    from .part import gain\n{MODEL}"}, "own/part.py"),
        ({"own/model.py": f"try:\n    import helpers\nexcept ImportError:\n    helpers = None\n{MODEL}"}, "helpers.py"),
        (
            {"own/model.py": f"import importlib\nlate = importlib.import_module('.part', __package__)\n{MODEL}"},
            "own/part.py",
        ),
        ({"own/model.py": MODEL}, "own/__init__.py"),
        ({"own/model.py": MODEL}, "own/model.py"),
    ],
)
def test_baseline_key_depends_on_all_that_a_model_imports(
    files: dict[str, str], changed: str, new_key: Callable[..., str]
) -> None:
    present = dict.fromkeys(("own/__init__.py", "own/second.py", "own/part.py", "own/sub/late.py"), "")
    present |= {
        "helpers.py": "gain = 1.0\n",
        "own/unused.py": "",
        "own/part.py": "gain = 1.0\n",
        "own/rest.py": "",
    } | files
    before = new_key(present)
    assert new_key(present | {"own/unused.py": "changed = True\n"}) == before
    assert new_key(present | {changed: f"{present.get(changed, '')}\ngain = 2.0\n"}) != before


def test_baseline_key_depends_on_the_code_of_a_user_optimizer(new_key: Callable[..., str]) -> None:
    def key(body: str, helper: str = "") -> str:
        code = f"import torch\nimport helpers\n\nclass Own(torch.optim.SGD):\n    {body}\n"
        optimizer = {"class_path": "own.optimizer.Own", "init_args": {"lr": 0.1}}
        files = {"own/__init__.py": "", "own/model.py": MODEL, "own/optimizer.py": code, "helpers.py": helper}
        return new_key(files, optimizer=optimizer)

    plain = key("pass")
    assert key("pass") == plain
    assert len({plain, key("momentum = 0.9"), key("pass", "gain = 2.0")}) == 3


@pytest.mark.parametrize("option", ["scheduler", "function of a scheduler", "callback"])
def test_baseline_key_depends_on_the_code_of_a_user_part(option: str, new_key: Callable[..., str]) -> None:
    code = """
import torch
from lightning.pytorch import Callback
from torch.optim.lr_scheduler import StepLR

class Own(Callback):
    pass

def own_factor(epoch):
    return 0.5**epoch

def own_scheduler(optimizer):
    return StepLR(optimizer, 1)
"""
    scheduler = {"class_path": "own.part.own_scheduler"}
    if option == "function of a scheduler":
        arguments = {"lr_lambda": "own.part.own_factor"}
        scheduler = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": arguments}
    trainer = TrainerFactory(accelerator="cpu", precision="32-true", threads=1, callbacks=["own.part.Own"])

    def key(line: str) -> str:
        files = {"own/__init__.py": "", "own/model.py": MODEL, "own/part.py": f"{code}\n{line}\n"}
        return new_key(files, trainer=trainer) if option == "callback" else new_key(files, scheduler=scheduler)

    assert key("") == key("") != key("more = 1")


def test_baseline_key_depends_on_the_module_of_a_factory(new_key: Callable[..., str]) -> None:
    def key(line: str) -> str:
        code = f"import torch\nfrom torchvision.models import ResNet, resnet18\n\ndef build(num_classes):\n    {line}\n"
        code += "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, num_classes))\n"
        return new_key({"own/__init__.py": "", "own/model.py": code}, "own.model.build")

    assert key("pass") == key("pass") != key("torch.nn.Linear.extra = 1")


@pytest.mark.parametrize("content", ["1.0", "2.0"])
def test_baseline_key_depends_on_attributes_that_a_model_reads_from_a_file(
    content: str, new_key: Callable[..., str], tmp_path: Path
) -> None:
    settings = tmp_path / "settings.json"
    line = f"self.settings = json.load(open({str(settings)!r}))"
    code = "import json\n" + MODEL.replace("super().__init__()", f"super().__init__()\n        {line}")
    settings.write_text(json.dumps({"gain": [1.0]}))
    before = new_key({"own/__init__.py": "", "own/model.py": code})
    settings.write_text(json.dumps({"gain": [float(content)]}))
    assert (new_key({"own/__init__.py": "", "own/model.py": code}) == before) == (content == "1.0")


def test_baseline_key_depends_on_a_function_that_a_file_configures(new_key: Callable[..., str], tmp_path: Path) -> None:
    def key(slope: float, body: str) -> str:
        settings = tmp_path / "slope.txt"
        settings.write_text(str(slope))
        line = f"slope = float(open({str(settings)!r}).read())\n        self.act = {body}"
        code = "from functools import partial\n" + MODEL.replace(
            "super().__init__()", f"super().__init__()\n        {line}"
        )
        return new_key({"own/__init__.py": "", "own/model.py": code})

    for body in ("partial(torch.nn.functional.leaky_relu, negative_slope=slope)", "lambda x: slope * x"):
        assert key(0.1, body) == key(0.1, body) != key(0.9, body)


def test_baseline_key_of_an_edited_file_is_that_of_the_loaded_code(
    new_key: Callable[..., str], federate: Federate, tmp_path: Path
) -> None:
    before = new_key({"own/__init__.py": "", "own/model.py": MODEL})
    (tmp_path / "code/own/model.py").write_text(f"{MODEL}\n# edited\n")
    options = ClientOptions(private_model={"class_path": "own.model.Net"})
    assert key_of(federate(Local(), client=options)) == before
    importlib.reload(sys.modules["own.model"])
    assert key_of(federate(Local(), client=options)) != before


def test_code_of_a_file_edited_after_its_import_is_not_known(
    tmp_path: Path, load: Callable[[str], types.ModuleType]
) -> None:
    (tmp_path / "edited.py").write_text("WIDTH = 8\n")
    module = load("edited")
    (tmp_path / "edited.py").write_text("WIDTH = 16\n")
    for _ in range(2):
        with pytest.raises(SourceUnavailableError, match="module edited may have changed since it was imported"):
            code_of(["edited"])
    importlib.reload(module)
    assert "edited" in code_of(["edited"])


@pytest.mark.parametrize(("seconds", "known"), [(60.0, True), (-60.0, False)])
def test_code_of_a_module_imported_before_fedekd_is_known_if_older_than_the_process(
    seconds: float,
    known: bool,
    tmp_path: Path,
    load: Callable[[str], types.ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 0 <= time.time() - source_code._PROCESS_STARTED < 86400
    monkeypatch.setattr(source_code, "_PROCESS_STARTED", time.time() + seconds)
    (tmp_path / "early.py").touch()
    load("early")
    monkeypatch.delitem(source_code._imports_seen.times, "early")
    with nullcontext() if known else pytest.raises(SourceUnavailableError, match="may have changed"):
        assert "early" in code_of(["early"])


@pytest.mark.parametrize(
    "source",
    [None, f"import importlib\n\ndef load(name):\n    return importlib.import_module(name)\n{MODEL}"],
    ids=["no file", "computed import"],
)
def test_baseline_of_unknown_code_is_trained_again_and_said(
    source: str | None,
    federate: Federate,
    tmp_path: Path,
    load: Callable[[str], types.ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("unseen")
    if source is None:
        exec(MODEL, module.__dict__)
    else:
        (tmp_path / "unseen.py").write_text(source)
        module = load("unseen")
    monkeypatch.setitem(sys.modules, "unseen", module)
    options = ClientOptions(local_epochs=1, private_model={"class_path": "unseen.Net"})
    recorder = Recorder()
    run = federate(client=options, baseline_dir=tmp_path / "local", observer=recorder)
    run.run()
    [warning] = recorder.warnings
    prefix = "local baselines are trained in every run, because their code cannot be compared: module unseen"
    assert warning.startswith(prefix)
    assert not (tmp_path / "local").exists()
    assert not restore_local_baseline(run.engine._new_client(0), 2, tmp_path / "local")  # type: ignore[attr-defined]


def test_code_of_standard_and_installed_modules_is_their_version() -> None:
    found = code_of(["numpy.linalg", "json.decoder", "torch.nn.modules.linear", "torchvision.models.resnet"])
    assert sorted(found) == ["numpy", "python", "torch", "torchvision"]
    assert found["numpy"].startswith(f"numpy {np.__version__}")
    with pytest.raises(SourceUnavailableError, match="module nowhere has no file"):
        code_of(["nowhere"])


def test_baseline_key_depends_on_the_cut_of_the_validation_split(federate: Federate) -> None:
    client = client_of(federate(Local()))
    before, splits = baseline_key(client), client.splits
    client.splits = replace(splits, tuning=splits.holdout, holdout=splits.tuning)
    keys = {before, baseline_key(client)}
    client.splits = replace(splits, calibration=splits.calibration.flip(0))
    assert len({*keys, baseline_key(client)}) == 3


def test_baseline_key_depends_on_the_unit_of_targets_and_its_code(federate: Federate) -> None:
    client = client_of(federate(Local()))
    before, splits = baseline_key(client), client.splits
    keys = {before}
    for unit in ({"target_shift": 40.0}, {"target_scale": 2.0}):
        client.splits = replace(splits, **unit)
        keys.add(baseline_key(client))
    assert len(keys) == 3
    assert "data/tables.py" in TRAINING_CODE


def test_baseline_key_depends_on_everything_that_decides_the_number(
    federate: Federate, npz: Path, write_blobs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data(path: Path = npz, **changes: Any) -> FederatedDataModule:
        return FederatedDataModule(str(path), **{"num_clients": 3, "alpha": 1.0, "batch_size": 8, **changes})

    def client(**changes: Any) -> ClientOptions:
        model = {"class_path": "fedekd.models.PrivateCNN"}
        optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
        return ClientOptions(**{"local_epochs": 1, "private_model": model, "optimizer": optimizer, **changes})

    def trainer(**changes: Any) -> TrainerFactory:
        return TrainerFactory(**{"accelerator": "cpu", "precision": "32-true", "threads": 1, **changes})

    plain = key_of(federate(Local()))
    same = [
        key_of(federate(Local())),
        key_of(federate(Local(), client=client(proxy_model={"class_path": "fedekd.models.PrivateCNN"}))),
        key_of(federate(Local(), trainer=trainer(device=0))),
        key_of(federate(Local(), trainer=trainer(gradient_clip_algorithm="value", callbacks=[]))),
        key_of(federate(Local(), client=client(scheduler_interval="step"))),
    ]
    assert set(same) == {plain}
    narrow = {"class_path": "fedekd.models.PrivateCNN", "init_args": {"width": 0.5}}
    step = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}
    longer = {**step, "init_args": {"step_size": 2}}
    other_data = write_blobs(tmp_path / "other.npz", seed=1)
    different = {
        "pixels": key_of(federate(Local(), data=data(other_data))),
        "partition": key_of(federate(Local(), data=data(alpha=5.0))),
        "split and its seed": key_of(federate(Local(), data=data(seed=1))),
        "batch_size": key_of(federate(Local(), data=data(batch_size=4))),
        "eval_batch_size": key_of(federate(Local(), data=data(eval_batch_size=2))),
        "client": baseline_key(federate(Local()).engine.client(1)),  # type: ignore[attr-defined]
        "seed": key_of(federate(Local(), seed=1)),
        "model": key_of(federate(Local(), client=client(private_model=narrow))),
        "exits": key_of(federate(Local(), client=client(exits=2))),
        "local_epochs": key_of(federate(Local(), client=client(local_epochs=2))),
        "lr_decay": key_of(federate(Local(), client=client(lr_decay=0.5))),
        "optimizer": key_of(federate(Local(), client=client(optimizer={"class_path": "torch.optim.SGD"}))),
        "scheduler": key_of(federate(Local(), client=client(scheduler=step))),
        "argument of it": key_of(federate(Local(), client=client(scheduler=longer))),
        "interval": key_of(federate(Local(), client=client(scheduler=step, scheduler_interval="step"))),
        **{
            str(changes): key_of(federate(Local(), trainer=trainer(**changes)))
            for changes in (
                {"precision": "bf16-mixed"},
                {"precision": "64-true"},
                {"threads": 2},
                {"channels_last": False},
                {"loop": "lean"},
                {"capture": False},
                {"callbacks": "LambdaCallback"},
                {"callbacks": [{"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.5}}]},
                {"gradient_clip_val": 1.0},
                {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
                {"accumulate_grad_batches": 2},
            )
        },
    }
    for name, patch in {
        "torch": (torch, "__version__", "0"),
        "lightning": (lightning, "__version__", "0"),
        "CPU": (torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        "code": (key_module, "package_code", lambda parts: "other"),
        "matmul": (torch, "get_float32_matmul_precision", lambda: "medium"),
        "deterministic": (torch, "are_deterministic_algorithms_enabled", lambda: True),
    }.items():
        with monkeypatch.context() as context:
            context.setattr(*patch)
            different[name] = key_of(federate(Local()))
    different["plain"] = plain
    by_key: dict[str, list[str]] = {}
    for name, key in different.items():
        by_key.setdefault(key, []).append(name)
    assert [names for names in by_key.values() if len(names) > 1] == []


def test_baseline_is_not_reused_for_another_cut_of_validation(federate: Federate, tmp_path: Path) -> None:
    client = client_of(federate(Local()))
    train_local_baseline(client, 1, tmp_path)
    again = client_of(federate(Local()))
    assert restore_local_baseline(again, 1, tmp_path)
    moved = client_of(federate(Local()))
    moved.splits = replace(moved.splits, holdout=moved.splits.calibration, calibration=moved.splits.holdout)
    assert not restore_local_baseline(moved, 1, tmp_path)
    losses = train_local_baseline(moved, 1, tmp_path).losses_after(1, "holdout")
    assert torch.equal(losses, moved.held_out("holdout")[0])
