"""What a configuration says, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedekd.configuration.options import as_values, federation_parser, parse, parts_of
from fedekd.errors import UserError
from fedekd.models import build_model, check_model


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", 64),
        ("convnext_tiny", 32),
        ("densenet121", 32),
        ("efficientnet_b0", 28),
        ("googlenet", 28),
        pytest.param("inception_v3", 96, marks=pytest.mark.slow),
        pytest.param("maxvit_t", 224, marks=pytest.mark.slow),
        ("mnasnet0_5", 28),
        ("mobilenet_v3_small", 28),
        ("regnet_y_400mf", 28),
        ("resnext50_32x4d", 28),
        ("shufflenet_v2_x0_5", 28),
        pytest.param("swin_t", 32, marks=pytest.mark.slow),
        pytest.param("vgg11", 32, marks=pytest.mark.slow),
        pytest.param("vit_b_16", 32, marks=pytest.mark.slow),
        pytest.param("wide_resnet50_2", 28, marks=pytest.mark.slow),
    ],
)
def test_one_model_of_each_of_torchvisions_families(name: str, size: int) -> None:
    """As the command line hands it on: with one argument that the user gave, and none that nobody gave."""
    parser = federation_parser()
    argv = ["--data.dataset=digits", f"--client.private_model=torchvision.models.{name}"]
    config = parse(parser, [*argv, "--client.private_model.progress=false"])
    spec = as_values(parser, config)["client"]["private_model"]
    assert spec == {"class_path": f"torchvision.models.{name}", "init_args": {"progress": False}}
    model = build_model(spec, input_shape=(1, size, size), num_classes=4)
    check_model(model, input_shape=(1, size, size), num_outputs=4)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 4)  # training: no auxiliary outputs
    assert as_values(parser, parse(parser, argv))["client"]["private_model"] == {"class_path": spec["class_path"]}


def test_only_what_was_chosen_of_a_model_is_kept() -> None:
    parser = federation_parser()
    model = "--client.proxy_model=torchvision.models.resnet18"
    config = parse(parser, ["--data.dataset=digits", model, "--client.proxy_model.zero_init_residual=true"])
    spec = {"class_path": "torchvision.models.resnet18", "init_args": {"zero_init_residual": True}}
    assert as_values(parser, config)["client"]["proxy_model"] == spec
    assert config.client.proxy_model.init_args.weights is None  # the parsed configuration is not changed
    # Of all other classes the defaults are kept: they decide the numbers, and a later version may change them.
    assert as_values(parser, config)["method"]["init_args"]["beta"] == 1.0


def test_factory_without_return_annotation_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plain_factories.py").write_text(
        "from torch import nn\n"
        "def linear(in_channels, num_classes, width=64):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes))\n"
        "def number(): return 3\n"
    )
    options = ["--data.dataset=digits", "--client.private_model.width=64"]
    spec = parts_of(["--client.private_model=plain_factories.linear", *options])["client"].private_model
    model = build_model(spec, input_shape=(1, 8, 8), num_classes=10)
    assert isinstance(model, nn.Sequential)
    with pytest.raises(UserError, match=r"expected a torch.nn.Module from 'plain_factories.number', got a int"):
        build_model({"class_path": "plain_factories.number"}, input_shape=(1, 8, 8), num_classes=10)
    with pytest.raises(UserError, match=r"--method: expected a subclass of Method, got plain_factories.linear"):
        parts_of(["--data.dataset=digits", "--method=plain_factories.linear"])


def test_width_of_the_default_proxy_is_an_option() -> None:
    parts = parts_of(["--config", "digits.yaml", "--client.proxy_model.width", "0.25", "--logger=null"])
    spec = parts["client"].proxy_model
    assert spec["init_args"] == {"width": 0.25}
    assert build_model(spec, input_shape=(1, 8, 8), num_classes=10).num_features == 32
