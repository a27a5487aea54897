from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedekd.errors import UserError
from fedekd.models import ImageClassifier, PrivateCNN, ProxyCNN, build_model, check_model, num_parameters

DATA = {"in_channels": 1, "image_size": 8, "num_classes": 4}


@pytest.mark.parametrize(
    "spec",
    [
        "PrivateCNN",
        "fedekd.models.PrivateCNN",
        {"class_path": "PrivateCNN"},
        {"class_path": "fedekd.models.PrivateCNN", "init_args": {}},
        {"class_path": "PrivateCNN", "init_args": {"image_size": [8, 8], "num_classes": 4}},
        SimpleNamespace(class_path="PrivateCNN", init_args=None),
        SimpleNamespace(class_path="PrivateCNN", init_args=SimpleNamespace(in_channels=1)),
    ],
)
def test_a_model_is_built_for_the_data_however_it_is_named(spec):
    model = build_model(spec, **DATA)
    assert type(model) is PrivateCNN
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_the_callers_seed_decides_the_weights():
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        built.append(build_model("ProxyCNN", **DATA).head.weight)
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


def test_a_torchvision_model_is_given_the_classes_and_wrapped():
    model = build_model("torchvision.models.resnet18", in_channels=1, image_size=32, num_classes=7)
    assert isinstance(model, ImageClassifier)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert num_parameters(model) == 11_180_103  # torchvision's 11,689,512 for 1000 classes, less 993 * 513


class GreyNet(nn.Module):
    """A user's own model: takes two of the three numbers, and one argument of its own."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 3) -> None:
        super().__init__()
        if width < 1:
            raise ValueError("width must be\nat least 1")
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 8), nn.Flatten(), nn.Linear(width, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def not_a_model() -> int:
    return 3


@pytest.fixture
def user_module(monkeypatch):
    module = SimpleNamespace(__name__="users", GreyNet=GreyNet, not_a_model=not_a_model)
    monkeypatch.setitem(__import__("sys").modules, "users", module)


@pytest.mark.usefixtures("user_module")
def test_a_users_model_gets_what_its_signature_takes_and_its_own_arguments():
    model = build_model({"class_path": "users.GreyNet", "init_args": {"width": 5}}, **DATA)
    assert type(model) is GreyNet
    assert model.layers[0].out_channels == 5
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("PrivatCNN", "did you mean 'PrivateCNN'"),
        ("torchvision.models.resnet19", "torchvision.models has no 'resnet19'; did you mean"),
        ("torchvison.models.resnet18", "cannot be imported: No module named 'torchvison'"),
        ("..PrivateCNN", "cannot be imported"),
        ("models..PrivateCNN", "cannot be imported"),
        ("", "has no ''"),
        ({"class_path": "ProxyCNN", "init_args": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        (
            {"class_path": "ProxyCNN", "init_args": {"num_classes": 5}},
            "num_classes is 5, but the data have 4",
        ),
        ({"class_path": "ProxyCNN", "init_args": {"image_size": 9}}, "image_size is 9, but the data have 8"),
        (
            {"class_path": "users.GreyNet", "init_args": {"width": 0}},
            "'users.GreyNet': width must be at least 1",
        ),
        ("users.not_a_model", "gives a int, not a torch.nn.Module"),
        ({"init_args": {}}, "must be a class path"),
        (3, "must be a class path"),
        ("torchvision.models.squeezenet1_1", "must end in a linear layer"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        build_model(spec, **DATA, flag="--client.private_model")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--client.private_model")


def test_the_data_are_named_when_they_do_not_fit_the_model():
    with pytest.raises(UserError, match="'ProxyCNN': image_size must be at least 8, but is 4"):
        build_model("ProxyCNN", in_channels=1, image_size=4, num_classes=10)
    assert isinstance(build_model(ProxyCNN.__module__ + ".ProxyCNN", **DATA), ProxyCNN)


class Answer(nn.Module):
    """Gives what it is told, or raises it."""

    def __init__(self, output):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.output = output

    def forward(self, x):
        self.norm(x)
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


@pytest.mark.parametrize("output", [torch.zeros(2, 4), [torch.zeros(2, 4), torch.ones(2, 4)]])
def test_a_model_that_fits_is_left_as_it_was(output):
    model = Answer(output).double()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_model(model, in_channels=1, image_size=(8, 9), num_outputs=4)
    assert (model.training, model.norm.training) == (True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, 5), r"gives \(2, 5\) for 2 images; \(2, 4\) is needed"),
        (torch.zeros(2), r"gives \(2,\)"),
        ([torch.zeros(2, 4), torch.zeros(2, 3)], r"gives \(2, 3\)"),
        ((torch.zeros(2, 4), None), "gives a NoneType"),
        ({"logits": torch.zeros(2, 4)}, "gives a dict"),
        (
            RuntimeError("mat1 and mat2\ncannot be multiplied"),
            "images of 1 x 8 x 9: mat1 and mat2 cannot be multiplied",
        ),
        (KeyError(), "images of 1 x 8 x 9: KeyError"),
    ],
)
def test_a_model_that_does_not_fit_is_told_in_one_line(output, message):
    model = Answer(output)
    with pytest.raises(UserError, match=f"^client.private_model Answer .*{message}") as caught:
        check_model(model, in_channels=1, image_size=(8, 9), num_outputs=4, flag="client.private_model")
    assert "\n" not in str(caught.value)
    assert model.training


@pytest.mark.parametrize("error", [RuntimeError("no\nmemory"), OSError("no weights")])
def test_whatever_a_builder_raises_is_the_users_to_see(error, monkeypatch):
    def builder(num_classes):
        raise error

    monkeypatch.setitem(__import__("sys").modules, "users", SimpleNamespace(__name__="users", builder=builder))
    with pytest.raises(UserError, match=r"'users.builder': no (memory|weights)"):
        build_model("users.builder", **DATA)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 28), ("inception_v3", 28)])
def test_a_model_for_larger_images_is_told_before_training(name, size):
    model = build_model(f"torchvision.models.{name}", in_channels=1, image_size=size, num_classes=4)
    with pytest.raises(UserError, match="cannot take images of 1 x 28 x 28"):
        check_model(model, in_channels=1, image_size=size, num_outputs=4)
