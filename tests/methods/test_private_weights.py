"""`client.private_weights`: initial weights of the private model from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from fedekd.benchmark import Block, cells
from fedekd.cli import main
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.federation.baseline_key import baseline_key
from fedekd.federation.checkpoint import pack
from fedekd.federation.run_folder import first_difference
from fedekd.flower.description import shared_config
from fedekd.methods import ClientOptions, FedAvg, FedeKD, Local
from fedekd.models import CIFARResNet, PrivateCNN, ProxyCNN, multi_exit
from tests.federation.runs import StopAfter, StoppedError, assert_equal_weights, weights

from .conftest import Federate, make_spec
from .test_teacher import _wrong_files

SMALL = {"class_path": "fedekd.models.ProxyCNN"}
ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}


def saved(path: Path, network: nn.Module) -> str:
    path.write_bytes(pack(network.state_dict()))
    return str(path)


def proxy(seed: int = 0, num_classes: int = 3) -> ProxyCNN:
    torch.manual_seed(seed)
    return ProxyCNN(1, 8, num_classes)


def options(**values: Any) -> ClientOptions:
    return ClientOptions(**{"local_epochs": 1, "private_model": SMALL, "optimizer": ADAM, **values})


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert {name for name, tensor in state.items() if not torch.equal(tensor, expected[name])} == set()


def test_private_weights_equal_the_file_at_all_clients(tmp_path: Path) -> None:
    network = proxy()
    spec = make_spec(client=options(private_weights=saved(tmp_path / "w.pt", network)))
    for number in (0, 1, "server"):
        assert_equal(dict(spec.build_model("private", number).state_dict()), dict(network.state_dict()))
    assert not torch.equal(spec.build_model("proxy", "server").head.weight, network.head.weight)


@pytest.mark.parametrize("is_headless", [False, True])
def test_private_weights_of_other_classes_get_a_new_seeded_head(is_headless: bool, tmp_path: Path) -> None:
    network = proxy(num_classes=7)
    state = {key: value for key, value in network.state_dict().items() if not (is_headless and "head" in key)}
    torch.save(state, tmp_path / "w.pt")
    heads = []
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        built: Any = make_spec(seed=seed, client=options(private_weights=str(tmp_path / "w.pt"))).build_model(
            "private", number
        )
        for name, tensor in built.state_dict().items():
            assert name.startswith("head.") or torch.equal(tensor, state[name])
        heads.append(built.head.weight)
    assert heads[0].shape == (3, 128)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_private_weights_of_plain_torchvision_network_keep_its_stem(num_classes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = resnet18(num_classes=num_classes).eval()
    model = {"class_path": "torchvision.models.resnet18"}
    client = options(private_model=model, private_weights=saved(tmp_path / "r.pt", network))
    built: Any = make_spec(input_shape=(1, 32, 32), client=client).build_model("private", 0)
    backbone = {name: tensor for name, tensor in network.state_dict().items() if "fc" not in name}
    assert_equal(built.backbone.state_dict(), backbone)
    assert torch.equal(built.head.weight, network.fc.weight) == (num_classes == 3)
    client = replace(client, exits=2, freeze="backbone")
    exits: Any = make_spec(input_shape=(1, 32, 32), client=client).build_model("private", 0)
    first = next(part for part in exits.modules() if isinstance(part, nn.Conv2d))
    assert torch.equal(first.weight, network.conv1.weight)


def test_private_weights_with_exits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = multi_exit(PrivateCNN(1, 8, 3), 3, 2)
    (tmp_path / "c.pt").write_bytes(pack(network.state_dict()))
    cnn = {"class_path": "fedekd.models.PrivateCNN"}
    client = options(private_model=cnn, exits=2, private_weights=str(tmp_path / "c.pt"))
    assert_equal(dict(make_spec(client=client).build_model("private", 1).state_dict()), dict(network.state_dict()))
    other = make_spec(num_outputs=4, client=client).build_model("private", 1)
    heads = {name for name in network.state_dict() if name.startswith(("heads.0.linear", "heads.1"))}
    assert len(heads) == 4
    for name, tensor in other.state_dict().items():
        assert name in heads or torch.equal(tensor, network.state_dict()[name])
    with pytest.raises(UserError, match=r"the network with 3 exits, got a file without 'stages\.2\."):
        make_spec(client=options(private_model=cnn, exits=3, private_weights=str(tmp_path / "c.pt"))).build_model(
            "private", 0
        )


def test_private_weights_with_exits_for_a_plain_network_names_the_option(tmp_path: Path) -> None:
    weights = saved(tmp_path / "w.pt", multi_exit(PrivateCNN(1, 8, 3), 3, 2))
    client = options(private_model={"class_path": "PrivateCNN"}, private_weights=weights)
    with pytest.raises(UserError, match=r"got a file without .*\. Its network has exits: set client\.exits 2$"):
        make_spec(client=client).build_model("private", 0)


def test_private_weights_wrong_file_raises_one_line_user_error(federate: Federate, tmp_path: Path) -> None:
    cases = {value["weights"]: words for value, words in _wrong_files(tmp_path).values()}
    cases.pop(str(tmp_path / "classes.pt"))
    cases[str(tmp_path / "shape.pt")] = (
        r"for images with 1 channels, as in the data, got one for 3 \(convolutions\.0\.w"
    )
    cases[saved(tmp_path / "other.pt", CIFARResNet(1, 8, 3))] = (
        "tensors of PrivateCNN, got a file without 'convolutions.0.weight', 'convolutions.0.bias',"
        " 'convolutions.3.weight' and 5 more"
    )
    cases[saved(tmp_path / "wide.pt", PrivateCNN(1, 8, 3, width=0.5))] = (
        r"expected convolutions\.0\.weight of shape \(64, 1, 3, 3\) for PrivateCNN, got \(32, 1, 3, 3\), and 8 more"
    )
    for path, words in {**cases, **_unsupported_tensors(tmp_path)}.items():
        with pytest.raises(UserError, match=words) as error:
            federate(Local(), client=options(private_model={"class_path": "PrivateCNN"}, private_weights=path)).run()
        assert str(error.value).startswith("client.private_weights: expected ")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 390
    assert not (tmp_path / "harm").exists()
    with pytest.raises(UserError, match="private_weights: expected null with several private models"):
        options(private_models=["PrivateCNN", "ProxyCNN"], private_weights=str(tmp_path / "wide.pt"))


def _unsupported_tensors(folder: Path) -> dict[str, str]:
    """Return files whose tensors cannot be weights, and the words of their errors."""
    state = PrivateCNN(1, 8, 3).state_dict()
    kinds = {
        "sparse": ({name: tensor.to_sparse() for name, tensor in state.items()}, "torch.sparse_coo"),
        "complex": ({name: tensor.to(torch.complex64) for name, tensor in state.items()}, "torch.complex64"),
        "meta": ({name: tensor.to("meta") for name, tensor in state.items()}, "the meta device"),
    }
    for name, (tensors, _) in kinds.items():
        torch.save(tensors, folder / f"{name}.pt")
    torch.save({}, folder / "empty.pt")
    words = {
        name: rf"expected dense tensors of real numbers, got 'convolutions\.0\.weight of {end}'"
        for name, (_, end) in kinds.items()
    }
    return {str(folder / f"{name}.pt"): text for name, text in {**words, "empty": r"\(empty\)"}.items()}


def test_fit_with_private_weights_and_freeze(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    """The command line, and `test` of the finished run; a missing pattern exits with one line."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "w.pt", proxy(num_classes=5))
    data = [f"--data.dataset={npz}", "--data.num_clients=3", "--rounds=1", "--trainer.accelerator=cpu"]
    model = ["--client.private_model=ProxyCNN", "--client.private_weights=w.pt", "--baseline_dir=local"]
    assert main(["fit", *data, *model, "--client.freeze=[convolutions.*]", "--output=run"]) == 0
    assert main(["fit", *data, *model, "--client.freeze=backbone", "--output=other"]) == 0
    capsys.readouterr()
    assert main(["fit", *data, *model, "--client.freeze=[stages.*]", "--output=wrong"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: client.freeze: expected patterns that match a parameter of ProxyCNN, got 'stages.*'")
    assert text.count("\n") == 1
    assert main(["test", "run"]) == 0


def test_private_weights_content_is_part_of_run_and_baseline(federate: Federate, tmp_path: Path) -> None:
    def run(name: str, file: Path, **parts: Any) -> Orchestrator:
        client = options(private_weights=str(file), freeze=["convolutions.0.*"])
        return federate(FedeKD(), client=client, rounds=RoundOptions(rounds=3), output=tmp_path / name, **parts)

    file, copy = tmp_path / "w.pt", tmp_path / "copy.pt"
    for path in (file, copy):
        saved(path, proxy())
    whole = run("whole", file)
    whole.run()
    with pytest.raises(StoppedError):
        run("cut", file, observer=StopAfter(phases=17)).run()
    again = run("cut", copy)  # the same content under another path
    again.run()
    assert_equal_weights(weights(whole), weights(again))
    keys = [baseline_key(run("key", path).engine.client(0)) for path in (file, copy)]  # type: ignore[attr-defined]
    saved(file, proxy(seed=1))
    keys.append(baseline_key(run("key", file).engine.client(0)))  # type: ignore[attr-defined]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(UserError, match=r"private_weights_sha256: expected the saved value"):
        run("cut", file).load_clients()


def test_replaced_file_during_a_run_raises_user_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", proxy())
    spec = make_spec(client=options(private_weights=path))
    spec.build_model("private", 0)
    saved(tmp_path / "w.pt", proxy(seed=1))
    make_spec(client=options(private_weights=path)).build_model("private", 0)
    with pytest.raises(UserError, match="expected the file with SHA-256"):
        spec.build_model("private", 0)


def test_key_of_a_grid_depends_on_the_content_of_the_weights(tmp_path: Path) -> None:
    def key(**values: Any) -> str:
        chosen = {"data.dataset": "digits", **values}
        [cell] = cells([Block(["digits"], [5.0], [0], {"L": {"class_path": "Local"}}, chosen, config="digits.yaml")])
        return cell.key

    one, two = (saved(tmp_path / name, proxy()) for name in ("a.pt", "b.pt"))
    plain, first, second = key(), key(**{"client.private_weights": one}), key(**{"client.private_weights": two})
    assert plain != first == second
    saved(tmp_path / "b.pt", proxy(seed=1))
    assert key(**{"client.private_weights": two}) != first
    assert key(**{"client.freeze": "backbone"}) != plain


def test_flower_sites_agree_on_weights_of_exchanged_private_models(tmp_path: Path) -> None:
    files = [saved(tmp_path / f"{name}.pt", proxy(seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for freeze, names in ((["convolutions.*"], {"frozen", "pretrained"}), (None, {"pretrained"})):
        values = []
        for path in files:
            spec = make_spec(client=options(private_weights=path, freeze=freeze))
            config = shared_config(FedAvg(), spec)
            values.append({name: config[name] for name in ("frozen", "pretrained") if name in config})
            assert not {"frozen", "pretrained"} & set(shared_config(FedeKD(), spec))  # of each site's own model
        assert set(values[0]) == names
        assert values[0] == values[1]
        assert all(values[0][name] != values[2][name] for name in names)
    assert not {"frozen", "pretrained"} & set(shared_config(FedAvg(), make_spec(client=options())))
    assert set(shared_config(FedAvg(), make_spec(client=options(freeze="backbone")))) >= {"frozen"}


def test_flower_site_without_the_weights_of_the_server_raises(tmp_path: Path) -> None:
    server = shared_config(FedAvg(), make_spec(client=options(private_weights=saved(tmp_path / "a.pt", proxy()))))
    site = shared_config(FedAvg(), make_spec(client=options()))
    assert first_difference(server, site) is not None
