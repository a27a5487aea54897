"""Loading of exported weights: foreign files raise one error, and call nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.export import InputFormat, ModelSpecification, load_network, load_served
from fedekd.export.weights_file import weights_file
from fedekd.models import PrivateCNN
from fedekd.models.weights import METADATA_KEY, unpack_weights

save = pytest.importorskip("safetensors.torch").save
pytestmark = pytest.mark.export

SPECIFICATION = ModelSpecification("classification", InputFormat("pixels", (1, 8, 8)), (1, 8, 8), 4, tuple("abcd"), {})


def write(path: Path, class_path: str, tensors: dict[str, Tensor] | None = None, **arguments: object) -> Path:
    values = {"class_path": class_path, "init_args": arguments, "exits": None, "depth": None}
    tensors = PrivateCNN(in_channels=1, image_size=8, num_classes=4).state_dict() if tensors is None else tensors
    path.write_bytes(weights_file(tensors, replace(SPECIFICATION, networks={"private": values})))
    return path


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("os.system", {"command": "touch called"}),
        ("fedekd.models.build_model", {"spec": {"class_path": "os.system", "init_args": {"command": "touch called"}}}),
        ("torchvision.models._utils.partial", {"func": "print"}),
        ("timm.models.load_state_dict", {"checkpoint_path": "called"}),
        ("unknown_networks.Own", {}),
    ],
)
def test_load_network_class_path_of_no_network_raises_and_calls_nothing(
    class_path: str, arguments: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "model.safetensors", class_path, **arguments)
    for load in (load_network, load_served):
        with pytest.raises(UserError, match="class_path: expected a network"):
            load(path)
    assert not Path("called").exists()


class Own(nn.Module):
    """A network of a user."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def test_load_network_of_a_trusted_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("own_networks")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "own_networks", module)
    tensors = Own(1, (8, 8), 4).state_dict()
    path = write(tmp_path / "model.safetensors", "own_networks.Own", tensors)
    with pytest.raises(UserError, match=r"trusted_modules=\('own_networks',\)"):
        load_network(path)
    loaded = load_network(path, trusted_modules=["own_networks"]).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_load_network_of_torchvision_is_built(tmp_path: Path) -> None:
    from fedekd.models import build_model

    class_path = "torchvision.models.shufflenet_v2_x0_5"
    tensors = build_model(class_path, input_shape=(1, 8, 8), num_classes=4).state_dict()
    path = write(tmp_path / "model.safetensors", class_path, dict(tensors))
    assert load_network(path).state_dict().keys() == tensors.keys()


def test_load_tensors_that_do_not_fit_raise_one_line_with_the_path(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "fedekd.models.PrivateCNN", {"other": torch.zeros(2)})
    with pytest.raises(UserError, match=r"expected tensors that fit the specification, got .*model\.safetensors"):
        load_served(path)


def test_specification_of_another_version_has_the_version_in_its_error() -> None:
    text = SPECIFICATION.to_json().replace('"format": 1', '"format": 7')
    with pytest.raises(UserError, match="format of the export: expected 1, got 7"):
        ModelSpecification.from_json(text)


@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"networks": 3}'])
def test_private_weights_with_foreign_metadata_raise_one_line(text: str) -> None:
    content = save({"weight": torch.zeros(2)}, {METADATA_KEY: text})
    with pytest.raises(UserError, match=r"client.private_weights: expected a file of fedekd export, or one without"):
        unpack_weights(content, "model.safetensors", "client.private_weights")
