from __future__ import annotations

from collections import namedtuple
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedekd.errors import UserError
from fedekd.federation.update_validation import UpdateValidator
from fedekd.functional import average_state_dicts
from fedekd.models import ImageClassifier, PrivateCNN, ProxyCNN, build_model, check_model, eval_mode, num_parameters

DATA = {"input_shape": (1, 8, 8), "num_classes": 4}


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
def test_build_model_accepts_every_form_of_specification(spec):
    model = build_model(spec, **DATA)
    assert type(model) is PrivateCNN
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_build_model_initial_weights_follow_global_seed():
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        built.append(build_model("ProxyCNN", **DATA).head.weight)
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


def test_build_model_torchvision_model_is_wrapped():
    model = build_model("torchvision.models.resnet18", input_shape=(1, 32, 32), num_classes=7)
    assert isinstance(model, ImageClassifier)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert num_parameters(model) == 11_180_103  # torchvision's 11,689,512 for 1000 classes, less 993 * 513


class GreyNet(nn.Module):
    """A user's model with two of the three data arguments, and one of its own."""

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
def test_build_model_passes_arguments_of_signature():
    model = build_model({"class_path": "users.GreyNet", "init_args": {"width": 5}}, **DATA)
    assert type(model) is GreyNet
    assert model.layers[0].out_channels == 5
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("PrivatCNN", "Did you mean 'PrivateCNN'"),
        ("torchvision.models.resnet19", "expected a model of torchvision.models, got 'resnet19'. Did you mean"),
        ("torchvison.models.resnet18", "expected an importable model, .* No module named 'torchvison'"),
        ("..PrivateCNN", "expected an importable model"),
        ("models..PrivateCNN", "expected an importable model"),
        ("", "got ''"),
        ({"class_path": "ProxyCNN", "init_args": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        (
            {"class_path": "ProxyCNN", "init_args": {"num_classes": 5}},
            "expected num_classes 4 as in the data, got 5",
        ),
        (
            {"class_path": "ProxyCNN", "init_args": {"image_size": 9}},
            "expected image_size \\(8, 8\\) as in the data, got 9",
        ),
        (
            {"class_path": "users.GreyNet", "init_args": {"width": 0}},
            "'users.GreyNet': ValueError: width must be at least 1",
        ),
        ("users.not_a_model", "expected a torch.nn.Module from .* got a int"),
        ({"init_args": {}}, "expected a class path"),
        (3, "expected a class path"),
        ("torchvision.models.squeezenet1_1", "expected a last linear layer"),
    ],
)
def test_build_model_invalid_specification_raises_one_line_user_error(spec, message):
    with pytest.raises(UserError, match=message) as error:
        build_model(spec, **DATA, flag="--client.private_model")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--client.private_model")


def test_build_model_too_small_images_raise_user_error():
    with pytest.raises(UserError, match=r"'ProxyCNN': image_size: expected at least 8, got \(4, 4\)"):
        build_model("ProxyCNN", input_shape=(1, 4, 4), num_classes=10)
    assert isinstance(build_model(ProxyCNN.__module__ + ".ProxyCNN", **DATA), ProxyCNN)


class Answer(nn.Module):
    """Returns the given output, or raises it."""

    def __init__(self, output):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.output = output

    def forward(self, x):
        nothing = 0 * self.norm(x).sum()
        if isinstance(self.output, Exception):
            raise self.output
        if isinstance(self.output, torch.Tensor):
            return self.output + nothing
        return [logits + nothing for logits in self.output] if type(self.output) is list else self.output


@pytest.mark.parametrize("output", [torch.zeros(2, 4), [torch.zeros(2, 4), torch.ones(2, 4)]])
def test_check_model_valid_model_is_unchanged(output):
    model = Answer(output).double()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_model(model, input_shape=(1, 8, 9), num_outputs=4)
    assert (model.training, model.norm.training) == (True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, 5), r"expected output \(2, 4\) for 2 samples, got \(2, 5\)"),
        (torch.zeros(2), r"got \(2,\)"),
        ([torch.zeros(2, 4), torch.zeros(2, 3)], r"got \(2, 3\)"),
        ((torch.zeros(2, 4), None), "got a NoneType"),
        ({"logits": torch.zeros(2, 4)}, "got a dict"),
        (
            RuntimeError("mat1 and mat2\ncannot be multiplied"),
            "images of 1 x 8 x 9.* It failed in evaluation mode: RuntimeError: mat1 and mat2 cannot be multiplied",
        ),
        (KeyError(), "images of 1 x 8 x 9.* It failed in evaluation mode: KeyError"),
    ],
)
def test_check_model_wrong_output_raises_one_line_user_error(output, message):
    model = Answer(output)
    with pytest.raises(UserError, match=f"^client.private_model Answer: .*{message}") as error:
        check_model(model, input_shape=(1, 8, 9), num_outputs=4, flag="client.private_model")
    assert "\n" not in str(error.value)
    assert model.training


@pytest.mark.parametrize("error", [RuntimeError("no\nmemory"), OSError("no weights")])
def test_build_model_errors_of_builder_become_user_error(error, monkeypatch):
    def builder(num_classes):
        raise error

    monkeypatch.setitem(__import__("sys").modules, "users", SimpleNamespace(__name__="users", builder=builder))
    with pytest.raises(UserError, match=r"'users.builder': (RuntimeError|OSError): no (memory|weights)"):
        build_model("users.builder", **DATA)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 28), ("inception_v3", 28)])
def test_check_model_model_for_larger_images_raises_user_error(name, size):
    model = build_model(f"torchvision.models.{name}", input_shape=(1, size, size), num_classes=4)
    with pytest.raises(UserError, match="expected to accept images of 1 x 28 x 28"):
        check_model(model, input_shape=(1, size, size), num_outputs=4)


Pair = namedtuple("Pair", ["logits", "aux"])


class Linear(nn.Module):
    """A linear layer whose output is transformed by a function of (module, logits)."""

    def __init__(self, transform):
        super().__init__()
        self.layer = nn.Linear(64, 4)
        self.dropout = nn.Dropout()
        self.transform = transform

    def forward(self, x):
        return self.transform(self, self.dropout(self.layer(x.flatten(1))))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda module, logits: (logits, logits) if module.training else logits, "as many outputs .* got 2 and 1"),
        (lambda module, logits: logits if module.training else logits[:, :3], r"got \(2, 3\) in evaluation mode"),
        (lambda module, logits: Pair(logits, logits) if module.training else logits, "got a Pair in training mode"),
        (lambda module, logits: Pair(logits, logits), "got a Pair in evaluation mode.* Return its logits"),
        (lambda module, logits: SimpleNamespace(logits=logits), "got a SimpleNamespace.* Return its logits"),
        (lambda module, logits: logits.max(1), "got a max in evaluation mode"),
        (lambda module, logits: [], "got an empty one"),
        (lambda module, logits: logits.round().long(), "torch.int64"),
        (lambda module, logits: logits.detach(), "outputs with a gradient"),
        (lambda module, logits: 1 / 0, "It failed in evaluation mode: ZeroDivisionError: division by zero"),
        (lambda module, logits: module.layer, "got a Linear in evaluation mode"),
    ],
)
def test_check_model_other_output_than_logits_raises_one_line(transform, message):
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=f"^model Linear: .*{message}") as error:
        check_model(Linear(transform), input_shape=(1, 8, 8), num_outputs=4)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 400
    torch.set_rng_state(state)


def test_check_model_draws_nothing_from_global_generators():
    model = Linear(lambda module, logits: (logits, logits))
    state = torch.get_rng_state()
    check_model(model, input_shape=(1, 8, 8), num_outputs=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_check_model_auxiliary_heads_name_the_option():
    spec = {"class_path": "torchvision.models.googlenet", "init_args": {"aux_logits": True, "init_weights": False}}
    model = build_model(spec, input_shape=(3, 32, 32), num_classes=4)
    with pytest.raises(UserError, match=r"Set --client\.private_model\.aux_logits false") as error:
        check_model(model, input_shape=(3, 32, 32), num_outputs=4, flag="client.private_model")
    assert len(str(error.value)) <= 400


class ExtraState(nn.Linear):
    """A layer with a state that is no tensor."""

    def __init__(self):
        super().__init__(64, 4)

    def get_extra_state(self):
        return {"calls": 1}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return super().forward(x.flatten(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).requires_grad_(False), "none of 2: all are frozen"),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 16)), nn.AdaptiveMaxPool1d(1), nn.Flatten()), "without param"),
        (ExtraState(), "expected tensors in state_dict.*, got a dict for '_extra_state'"),
    ],
)
def test_check_model_nothing_to_train_or_average_raises_one_line(model, message):
    with pytest.raises(UserError, match=message):
        check_model(model, input_shape=(1, 8, 8), num_outputs=4)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda in_channels, num_classes: nn.Sequential(nn.LazyLinear(num_classes)), "the lazy '0.weight'"),
        (lambda num_classes: nn.Sequential(nn.LazyConv2d(3, 3), nn.Linear(3, num_classes)), "the lazy '0.weight'"),
        (lambda in_channels, num_classes: nn.Linear(64, num_classes, device="meta"), "'weight' on the meta device"),
        (lambda in_channels, num_classes: [][0], "IndexError: list index out of range"),
        (lambda in_channels, num_classes: in_channels.no_such, "AttributeError: .* no attribute 'no_such'"),
    ],
)
def test_build_model_unusable_model_raises_one_line(factory, message, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "users", SimpleNamespace(__name__="users", factory=factory))
    with pytest.raises(UserError, match=f"^model 'users.factory': .*{message}") as error:
        build_model("users.factory", **DATA)
    assert "\n" not in str(error.value)


def test_build_model_complex_tensors_are_averaged(monkeypatch):
    def factory(in_channels, num_classes):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
        model.register_buffer("spectrum", torch.full((2,), 1j))
        return model

    monkeypatch.setitem(__import__("sys").modules, "users", SimpleNamespace(__name__="users", factory=factory))
    state = build_model("users.factory", **DATA).state_dict()
    other = {**state, "spectrum": torch.full((2,), 3 + 1j)}
    assert UpdateValidator(max_norm=100.0).check(other, state) is None
    assert average_state_dicts([state, other])["spectrum"].tolist() == [1.5 + 1j, 1.5 + 1j]


class Merging(nn.Module):
    """Merges a low-rank part into its weight in eval mode, and removes it in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.low_rank = torch.zeros(3), torch.ones(3)

    def train(self, mode: bool = True) -> Merging:
        if mode != self.training:
            self.weight += -self.low_rank if mode else self.low_rank
        return super().train(mode)


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_restores_network_with_custom_train(training: bool) -> None:
    network = nn.Sequential(Merging(), nn.Dropout()).train(training)
    before = network[0].weight.clone()
    with eval_mode(network):
        assert not any(module.training for module in network.modules())
        assert torch.equal(network[0].weight, torch.ones(3))
    assert all(module.training == training for module in network.modules())
    assert torch.equal(network[0].weight, before)


@pytest.mark.parametrize("frozen", [0, 1])
def test_eval_mode_restores_mode_of_each_module(frozen: int) -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    network[frozen].eval()
    with suppress(ValueError), eval_mode(network):
        assert not network[1 - frozen].training
        raise ValueError("it fails")
    assert network.training
    assert (network[frozen].training, network[1 - frozen].training) == (False, True)
