"""A class that is chosen has its own defaults, whatever class stood there before."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import _typehints

import fedekd.methods
from fedekd.configuration.jsonargparse_patches import patched_jsonargparse
from fedekd.configuration.options import as_values, federation_parser, parse

METHODS = [
    name
    for name, found in vars(fedekd.methods).items()
    if isinstance(found, type) and issubclass(found, fedekd.methods.Method) and not inspect.isabstract(found)
]


def parsed(*argv: str) -> dict[str, Any]:
    parser = federation_parser()
    return as_values(parser, parse(parser, ["--data.dataset=digits", *argv]))


def own(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(fedekd.methods, name)).parameters
    return {argument: parameter.default for argument, parameter in parameters.items()}


@pytest.mark.parametrize("before", [[], ["--config=cafedistill/cifar10.yaml"]])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_by_name_has_its_own_defaults(name: str, before: list[str]) -> None:
    for written in (name, f'{{"class_path": "{name}"}}'):
        said = parsed(*before, f"--method={written}")["method"].get("init_args", {})
        expected = own(name)
        if not before or name != "FedeKD":  # a configuration may say something of its own method
            assert said == {argument: expected[argument] for argument in said}
            assert said.keys() == expected.keys()


def test_what_is_said_of_a_class_before_is_not_meant_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: {class_path: SafeKD, init_args: {temperature: 7.0}}\n")
    assert parsed(f"--config={path}")["method"]["init_args"]["temperature"] == 7.0
    assert parsed(f"--config={path}", "--method=FedeKD")["method"]["init_args"]["temperature"] == 1.0
    assert parsed(f"--config={path}", "--method=SafeKD")["method"]["init_args"]["temperature"] == 7.0
    after = parsed(f"--config={path}", "--method=ScaleFL", "--method.temperature=5")
    assert after["method"]["init_args"]["temperature"] == 5.0


def test_optimizers_too() -> None:
    assert parsed("--client.optimizer=AdamW")["client"]["optimizer"]["init_args"]["weight_decay"] == 0.01
    assert parsed("--client.optimizer=SGD")["client"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert parsed("--client.optimizer.lr=0.5")["client"]["optimizer"]["init_args"]["lr"] == 0.5
    both = parsed("--client.optimizer=SGD", "--client.optimizer.lr=0.1", "--client.optimizer.momentum=0.9")
    assert (both["client"]["optimizer"]["init_args"]["lr"], both["client"]["optimizer"]["init_args"]["momentum"]) == (
        0.1,
        0.9,
    )


def test_other_parsers_of_the_process_are_left_alone() -> None:
    before = _typehints.discard_init_args_on_class_path_change
    with patched_jsonargparse():
        assert _typehints.discard_init_args_on_class_path_change is not before
    assert _typehints.discard_init_args_on_class_path_change is before
    parsed("--method=SafeKD")
    assert _typehints.discard_init_args_on_class_path_change is before


def test_name_of_a_model_of_fedekd_is_not_ambiguous() -> None:
    from torchvision.ops import MLP  # has the same name as a model of fedekd

    assert MLP.__name__ == "MLP"
    options = ["--data.dataset=x.csv", "--client.private_model=MLP", "--client.private_model.hidden=[8]"]
    config = parse(federation_parser(), options)
    assert config.client.private_model.class_path == "fedekd.models.MLP"
    assert list(config.client.private_model.init_args.hidden) == [8]
