"""Cached local baselines are reused only if the code that trained them is unchanged."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedekd
from fedekd.federation.local_baseline import TRAINING_CODE, baseline_key
from fedekd.methods import ClientOptions, Local

from .conftest import Federate

ROOT = Path(fedekd.__file__).parent

#: Imports of the training code that are not hashed, and the reason.
HASHED_OTHERWISE = {
    "data": "the samples themselves are part of the key",
    **dict.fromkeys(
        [f"models/{name}.py" for name in ("cnn", "cost", "image_classifier", "multi_exit", "stages")],
        "so are the weights, and the files of the network's own layers",
    ),
    "methods/base.py": "abstract hooks",
    "errors.py": "raised before training",
    "tasks.py": "two names of tasks",
}


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
    found, waiting = set[Path](), [ROOT / "methods/client.py", ROOT / "methods/local.py"]
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += imports(path)
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    assert "modules/objective_module.py" in names  # through methods/client.py and modules/__init__.py
    assert "functional/precision.py" in names
    known = (*TRAINING_CODE, *HASHED_OTHERWISE)
    assert [name for name in names if not any(name == one or name.startswith(f"{one}/") for one in known)] == []


def test_baseline_key_depends_on_the_code_of_a_user_optimizer(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(body: str) -> str:
        (tmp_path / "own_optimizer.py").write_text(f"import torch\n\nclass Own(torch.optim.SGD):\n    {body}\n")
        sys.modules.pop("own_optimizer", None)
        importlib.invalidate_caches()
        options = ClientOptions(optimizer={"class_path": "own_optimizer.Own", "init_args": {"lr": 0.1}})
        return baseline_key(federate(Local(), client=options).engine.client(0))  # type: ignore[attr-defined]

    monkeypatch.syspath_prepend(tmp_path)
    assert key("pass") == key("pass") != key("momentum = 0.9")


def test_training_code_files_exist() -> None:
    assert all((ROOT / part).exists() for part in TRAINING_CODE)
