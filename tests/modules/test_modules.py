"""ProxyDistillModule and GatedPrivateModule: losses against a literal transcription, and use in a plain Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedekd import GatedPrivateModule, ProxyDistillModule
from fedekd import functional as F
from fedekd.errors import UserError
from fedekd.metrics import primary_metric
from fedekd.models import PrivateCNN, ProxyCNN
from fedekd.modules import (
    HeldOutTrust,
    ModelOutput,
    ObjectiveModule,
    SupervisedLoss,
    SupervisedModule,
    predict,
)
from fedekd.modules.energies import DisagreementEnergy, FeatureEnergy
from fedekd.modules.losses import GATES, copy_parameters
from fedekd.tasks import Task


def networks(task: Task = "classification", classes: int = 4) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    outputs = 1 if task == "regression" else classes
    return PrivateCNN(1, 8, outputs), ProxyCNN(1, 8, outputs)


def batch(task: Task = "classification", n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    y = torch.randint(0, 4, (n,), generator=generator)
    return x, y.float() if task == "regression" else y


def held_out_trust(proxy: nn.Module, task: Task = "classification") -> HeldOutTrust:
    x, y = batch(task, 60)
    dtype = next(proxy.parameters()).dtype
    with torch.no_grad():
        return HeldOutTrust(task, proxy(x.to(dtype)), y, mean=1.5)


def loader(task: Task = "classification", n: int = 24) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch(task, n)), batch_size=8)


def plain_trainer(folder: Path, epochs: int = 2) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def test_module_predict_accepts_loaders_with_and_without_targets(tmp_path: Path) -> None:
    private, proxy = networks()
    x, _ = batch(n=24)
    with torch.no_grad():
        expected = private.eval()(x)
    for dataloader in (loader(), DataLoader(x, batch_size=8)):  # type: ignore[arg-type, var-annotated]
        outputs = plain_trainer(tmp_path).predict(GatedPrivateModule(private, proxy), dataloader)
        assert outputs is not None
        torch.testing.assert_close(torch.cat(outputs), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [GatedPrivateModule, ProxyDistillModule])
def test_module_network_as_its_own_teacher_raises_user_error(module: Callable[..., Any]) -> None:
    network, _ = networks()
    with pytest.raises(UserError, match="teacher: expected another network"):
        module(network, network)


def literal_private_loss(p_logits: Tensor, q_logits: Tensor, y: Tensor, beta: float, lam: float) -> Tensor:
    """Eq. 1, 3, 4 and 5, sample by sample."""
    energies, losses = [], []
    for p_row, q_row in zip(p_logits, q_logits, strict=True):
        p, q = p_row.softmax(0), q_row.softmax(0)
        kl_pq, kl_qp = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        entropy_p, entropy_q = -(p * p.log()).sum(), -(q * q.log()).sum()
        energies.append(0.5 * (kl_pq + kl_qp) / (entropy_p + entropy_q + 1e-8))
        losses.append(kl_qp)
    energy = torch.stack(energies).detach()
    normalised = (energy - energy.mean()) / (((energy - energy.mean()) ** 2).mean().sqrt() + 1e-8)
    weights = 1 / (1 + torch.exp(beta * normalised))
    supervised = torch.stack([-row.softmax(0)[label].log() for row, label in zip(p_logits, y, strict=True)]).mean()
    return supervised + lam * (weights * torch.stack(losses)).sum() / len(losses)


@pytest.mark.parametrize(("beta", "lam"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_gated_private_module_step_matches_equation_5_in_value_and_gradient(beta: float, lam: float) -> None:
    private, proxy = (network.double() for network in networks())
    x, y = batch()
    x = x.double()
    module = GatedPrivateModule(private, proxy, beta=beta, lambda_kd=lam)
    loss = module.training_step((x, y), 0)
    loss.backward()
    ours = [parameter.grad.clone() for parameter in private.parameters()]
    private.zero_grad()
    with torch.no_grad():
        q_logits = proxy(x)
    literal = literal_private_loss(private(x), q_logits, y, beta, lam)
    literal.backward()
    torch.testing.assert_close(loss, literal, rtol=1e-12, atol=1e-12)
    for mine, parameter in zip(ours, private.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-9, atol=1e-12)


def test_gated_private_module_regression_step_matches_equations_2_to_5() -> None:
    private, proxy = (network.double() for network in networks("regression"))
    x, y = batch("regression")
    x, y = x.double(), y.double()
    loss = GatedPrivateModule(private, proxy, task="regression", beta=2.0).training_step((x, y), 0)
    f, g = private(x).squeeze(1), proxy(x).squeeze(1)
    energy = 0.5 * (f - g) ** 2
    weights = torch.sigmoid(-2.0 * (energy - energy.mean()) / (energy.std(correction=0) + 1e-8))
    torch.testing.assert_close(loss, ((f - y) ** 2).mean() + (weights * (f - g) ** 2).mean(), rtol=1e-12, atol=1e-12)


def test_proxy_distill_module_step_is_mean_kl() -> None:
    private, proxy = (network.double() for network in networks())
    x, y = batch()
    x = x.double()
    loss = ProxyDistillModule(proxy, private, temperature=2.0).training_step((x, y), 0)
    p, q = (private(x) / 2).softmax(1), (proxy(x) / 2).softmax(1)
    torch.testing.assert_close(loss, 4 * (p * (p / q).log()).sum(1).mean(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_gated_private_module_teacher_outputs_in_batch_replace_forward(task: Task) -> None:
    private, proxy = networks(task)
    x, y = batch(task)
    with torch.no_grad():
        teacher_outputs = proxy(x)
    module = GatedPrivateModule(private, proxy, task=task)
    torch.testing.assert_close(module.training_step((x, y, teacher_outputs), 0), module.training_step((x, y), 0))


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("which", ["private", "proxy"])
def test_module_in_plain_trainer_trains_student_not_teacher(task: Task, which: str, tmp_path: Path) -> None:
    private, proxy = networks(task)
    module: ObjectiveModule = (
        GatedPrivateModule(private, proxy, task=task)
        if which == "private"
        else ProxyDistillModule(proxy, private, task=task)
    )
    assert module.teacher is not None
    student_before, teacher_before = (
        copy.deepcopy(module.network.state_dict()),
        copy.deepcopy(module.teacher.state_dict()),
    )
    trainer = plain_trainer(tmp_path)
    trainer.fit(module, loader(task), loader(task))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(student_before.values(), module.network.state_dict().values(), strict=True)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(teacher_before.values(), module.teacher.state_dict().values(), strict=True)
    )
    score = f"val/{primary_metric(task).name}"
    expected = {"loss", "val/loss", score}
    expected |= (
        {"loss/supervised", "loss/gated", "gate/weight_mean", "gate/energy_mean"}
        if which == "private"
        else {"loss/distilled"}
    )
    assert expected <= set(trainer.callback_metrics)
    if which == "private":
        assert trainer.callback_metrics["gate/weight_mean"] == pytest.approx(0.5, abs=0.2)
    [tested] = trainer.test(module, loader(task), verbose=False)
    x, y = batch(task, 24)
    with torch.no_grad():
        output = module.network(x)
    by_hand = (
        (output.squeeze(1) - y).square().mean().sqrt()
        if task == "regression"
        else (output.argmax(1) == y).float().mean()
    )
    assert tested[score.replace("val", "test")] == pytest.approx(float(by_hand), rel=1e-5)


def test_module_logged_means_are_weighted_by_batch_size(tmp_path: Path) -> None:
    network, _ = networks()
    module = SupervisedModule(network, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    trainer = plain_trainer(tmp_path, epochs=1)
    x, y = batch(n=20)  # batches of 8, 8 and 4
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8))
    assert module.epoch_means["loss"] == pytest.approx(float(nn.functional.cross_entropy(network(x), y)), rel=1e-5)


def test_module_sets_train_mode_of_student_and_eval_mode_of_teacher(tmp_path: Path) -> None:
    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[bool] = []
            self.layer = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.modes.append(self.training)
            return self.layer(x.flatten(1))

    student, teacher = Watch().eval(), Watch().train()
    plain_trainer(tmp_path, epochs=1).fit(ProxyDistillModule(student, teacher), loader())
    assert student.modes == [True] * 3
    assert teacher.modes == [False] * 3


def test_module_keeps_statistics_of_a_frozen_backbone_in_evaluation_mode(tmp_path: Path) -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)).requires_grad_(False).eval()
    network = nn.Sequential(backbone, nn.Linear(8, 4))
    before = copy.deepcopy(backbone.state_dict())
    plain_trainer(tmp_path, epochs=1).fit(SupervisedModule(network), loader())
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_gated_private_module_lambda_0_equals_supervised_bit_for_bit(tmp_path: Path) -> None:
    private, proxy = networks()
    supervised = copy.deepcopy(private)
    plain_trainer(tmp_path).fit(GatedPrivateModule(private, proxy, lambda_kd=0.0), loader())
    plain_trainer(tmp_path).fit(SupervisedModule(supervised), loader())
    for mine, local in zip(private.parameters(), supervised.parameters(), strict=True):
        assert torch.equal(mine, local)


def test_module_carries_optimizer_state_between_fits(tmp_path: Path) -> None:
    once, twice = networks()[0], networks()[0]
    plain_trainer(tmp_path, epochs=2).fit(SupervisedModule(once), loader())
    state = None
    for _ in range(2):
        module = SupervisedModule(twice)
        module.carries_optimizer_state, module.optimizer_state = True, state
        plain_trainer(tmp_path, epochs=1).fit(module, loader())
        state = module.optimizer_state
    for one, two in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(one, two)


def test_module_second_fit_creates_new_optimizer(tmp_path: Path) -> None:
    module = SupervisedModule(networks()[0])
    plain_trainer(tmp_path, epochs=1).fit(module, loader())
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    trainer = plain_trainer(tmp_path, epochs=1)
    trainer.fit(module, loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_module_parameters_and_state_dict_exclude_teacher() -> None:
    private, proxy = networks()
    module = GatedPrivateModule(private, proxy)
    trained = {id(parameter) for parameter in private.parameters()}
    assert {id(parameter) for parameter in module.parameters()} == trained
    assert not any("teacher" in name for name in module.state_dict())


def test_module_evaluates_targets_of_shape_b_1_as_of_shape_b(tmp_path: Path) -> None:
    private, proxy = networks("regression")
    x, y = batch("regression", 24)
    module = GatedPrivateModule(private, proxy, task="regression")
    trainer = plain_trainer(tmp_path, epochs=1)
    results = []
    for targets in (y, y.reshape(-1, 1)):
        [scores] = trainer.test(module, DataLoader(TensorDataset(x, targets), batch_size=8), verbose=False)
        results.append(scores)
    assert results[0] == results[1]


def test_module_double_precision_converts_teacher_and_projection(tmp_path: Path) -> None:
    module = GatedPrivateModule(*networks(), energy="feature")
    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader())
    assert torch.isfinite(trainer.callback_metrics["loss"])


def test_module_with_networks_of_its_own_dtype_keeps_it(tmp_path: Path) -> None:
    """Here the samples have the dtype of the networks, and the Trainer's precision is the default."""
    networks_ = [nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double() for _ in range(2)]
    x, y = batch()
    plain_trainer(tmp_path, epochs=1).fit(
        GatedPrivateModule(*networks_), DataLoader(TensorDataset(x.double(), y), batch_size=4)
    )
    assert {parameter.dtype for network in networks_ for parameter in network.parameters()} == {torch.float64}


def test_module_sums_half_precision_values_in_float32() -> None:
    module = ObjectiveModule(nn.Linear(2, 2), [])
    module._count(1)
    for _ in range(1000):
        module.record("value", torch.tensor(0.1, dtype=torch.bfloat16))
    assert module._sums["value"].item() == pytest.approx(100, rel=0.01)  # a sum in bfloat16 stops at 32


def test_module_forgets_an_interrupted_epoch() -> None:
    module = ObjectiveModule(nn.Linear(2, 2), [])
    module._count(8)
    module.on_fit_start()
    assert module.samples_seen == 0


@pytest.mark.parametrize(("output", "got"), [({"logits": torch.zeros(2, 4)}, "dict"), ([], "list"), ([1], "list")])
def test_predict_of_other_outputs_raises_one_line(output: Any, got: str) -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    with pytest.raises(UserError, match=f"network: expected a tensor, or a list .*, got a {got}$"):
        predict(Network(), torch.zeros(2, 3))


class WithFeatures(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


@pytest.mark.parametrize(
    ("network", "items", "words"),
    [
        (nn.Linear(3, 4), {"x": torch.zeros(2, 3), "y": torch.zeros(2)}, r"batch: expected \(x, y\).*, got a dict"),
        (nn.Linear(3, 4), (torch.zeros(2, 3),), "batch: expected .*, got 1 items"),
        (nn.Linear(3, 4), (torch.zeros(2, 3), torch.tensor([0, 1]), torch.arange(2)), r"third item, got torch\.int64"),
        (
            WithFeatures(3, 4),
            (torch.zeros(2, 3), torch.tensor([0, 1])),
            r"of one shape, got the shapes \(2, 4\), \(2, 3\)",
        ),
    ],
)
def test_training_step_of_other_batches_and_outputs_raises_one_line(network: Any, items: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ProxyDistillModule(network, nn.Linear(3, 4)).training_step(items, 0)


@pytest.mark.parametrize("energy", ["kl", "entropy", "margin", "logsumexp", "feature"])
@pytest.mark.parametrize("gate", GATES)
def test_gated_private_module_every_energy_and_gate_trains(energy: str, gate: Any) -> None:
    private, proxy = networks()
    module = GatedPrivateModule(private, proxy, energy=energy, gate=gate, trust=held_out_trust(proxy))
    loss = module.training_step(batch(), 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in private.parameters())
    weight = float(module._sums["gate/weight_mean"]) / 12
    if gate.startswith("correctness"):
        assert 0 < weight < 0.5  # an untrained proxy is right on about a quarter
    else:
        assert weight == pytest.approx(1.0 if gate == "none" else 0.5, abs=0.2)


@pytest.mark.parametrize(
    ("gate", "shuffled"),
    [("energy", "shuffled"), ("reversed", "reversed_shuffled"), ("correctness", "correctness_shuffled")],
)
def test_shuffled_gate_permutes_weights(gate: Any, shuffled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    private, proxy = networks()
    used: list[Tensor] = []
    monkeypatch.setattr(F, "gated_distillation", lambda loss, weights: (used.append(weights), loss.mean())[1])
    for name in (gate, shuffled):
        torch.manual_seed(3)
        module = GatedPrivateModule(private, proxy, gate=name, trust=held_out_trust(proxy))
        module.training_step(batch(n=50), 0)
    weights, permuted = used
    assert not torch.equal(weights, permuted)
    assert torch.equal(weights.sort().values, permuted.sort().values)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("gate", ["reversed", "correctness"])
def test_gated_private_module_gate_matches_literal_weights(gate: Any, task: Task) -> None:
    private, proxy = (network.double() for network in networks(task))
    x, y = batch(task)
    x = x.double()
    y = y.double() if task == "regression" else y
    trust = held_out_trust(proxy, task)
    module = GatedPrivateModule(private, proxy, task, beta=2.0, lambda_kd=0.5, gate=gate, trust=trust)
    f, g = private(x), proxy(x).detach()
    if task == "regression":
        supervised, losses = ((f[:, 0] - y) ** 2).mean(), ((f - g) ** 2)[:, 0]
        energy = 0.5 * losses
        rows, values = [0] * len(x), g[:, 0].tolist()
    else:
        p, q = f.softmax(1), g.softmax(1)
        supervised = -p[torch.arange(len(y)), y].log().mean()
        losses = (q * (q / p).log()).sum(1)
        entropies = -(p * p.log()).sum(1) - (q * q.log()).sum(1)
        energy = 0.5 * ((p * (p / q).log()).sum(1) + losses) / (entropies + 1e-8)
        rows, values = q.argmax(1).tolist(), q.amax(1).tolist()
    if gate == "reversed":
        normalised = (energy - energy.mean()) / (energy.std(correction=0) + 1e-8)
        weights = 1 / (1 + torch.exp(-2.0 * normalised))
    else:
        columns = [sum(edge <= value for edge in trust.edges.tolist()) for value in values]
        weights = torch.stack([trust.weights[row, column] for row, column in zip(rows, columns, strict=True)])
        assert len(weights.unique()) > 1
    literal = supervised + 0.5 * (weights.detach() * losses).mean()
    loss = module.training_step((x, y), 0)
    torch.testing.assert_close(loss, literal, rtol=1e-10, atol=1e-12)
    # No gradient passes through the weights.
    ours, expected = (torch.autograd.grad(value, list(private.parameters())) for value in (loss, literal))
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


def test_gated_private_module_correctness_without_trust_raises_user_error() -> None:
    with pytest.raises(UserError, match=r"trust: expected a HeldOutTrust for gate 'correctness', got None\."):
        GatedPrivateModule(*networks(), gate="correctness")
    GatedPrivateModule(*networks(), gate="correctness", lambda_kd=0.0)


def test_gated_private_module_trust_moves_with_the_module_and_is_not_saved() -> None:
    private, proxy = networks()
    module = GatedPrivateModule(private, proxy, gate="correctness", trust=held_out_trust(proxy)).double()
    assert module.trust is not None
    assert module.trust.weights.dtype == torch.float64
    assert not any("trust" in name for name in module.state_dict())


def test_trust_in_half_precision_keeps_its_edges() -> None:
    logits = torch.linspace(0, 12, 200)[:, None] * torch.tensor([1.0, 0.0])
    trust = HeldOutTrust("classification", logits, torch.arange(200) % 7 // 6)
    expected = trust(logits)
    assert torch.equal(trust.to(torch.bfloat16)(logits), expected)
    assert trust.double().float().edges.dtype == torch.float32


def test_feature_energy_under_autocast_is_computed_in_float32() -> None:
    private, proxy = (ModelOutput((torch.zeros(4, 2),), torch.randn(4, size)) for size in (6, 3))
    energy = FeatureEnergy(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = energy(private, proxy)
    assert torch.equal(found, energy(private, proxy))


def test_uncertainty_energy_uses_selected_model() -> None:
    from fedekd.functional import entropy_energy
    from fedekd.modules import build_energy

    private, proxy = networks()
    x, _ = batch()
    outputs = {"private": ModelOutput((private(x),)), "proxy": ModelOutput((proxy(x),))}
    for of in ("private", "proxy"):
        energy = build_energy("entropy", "classification", of, private, proxy)
        torch.testing.assert_close(energy(outputs["private"], outputs["proxy"]), entropy_energy(outputs[of].output))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"energy": "kll"}, "Did you mean 'kl'"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"lambda_kd": -1.0}, "lambda_kd"),
        ({"gate": "energetic"}, "gate: expected one of energy, shuffled, none, reversed, .*, got 'energetic'"),
        ({"task": "ranking"}, "ranking"),
        ({"task": "regression", "energy": "margin"}, "defined for regression, got 'margin'"),
        ({"energy": F.kl_energy}, "energy: expected kl, .*, feature or an instance of Energy, got <function kl_energy"),
        ({"energy": DisagreementEnergy}, "energy: expected .* an instance of Energy, got <class"),
        ({"active": [False]}, "active: expected at least one exit"),
    ],
)
def test_gated_module_invalid_argument_raises_one_line_user_error(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        GatedPrivateModule(*networks(), **arguments)
    assert "\n" not in str(error.value)


def test_feature_energy_without_features_raises_user_error() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(UserError, match="Sequential"):
        GatedPrivateModule(plain, networks()[1], energy="feature")


class Data(LightningDataModule):
    """A user's data module."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return loader()


def test_gated_private_module_works_with_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cnn: Callable[[str], list[str]] = lambda name: [  # noqa: E731
        f"--model.{name}.in_channels=1",
        f"--model.{name}.image_size=8",
        f"--model.{name}.num_classes=4",
    ]
    cli = LightningCLI(
        GatedPrivateModule,
        Data,
        save_config_callback=None,
        args=[
            "fit",
            "--model.private=fedekd.models.PrivateCNN",
            *cnn("private"),
            "--model.proxy=fedekd.models.ProxyCNN",
            *cnn("proxy"),
            "--model.beta=2.0",
            "--model.optimizer=torch.optim.SGD",
            "--model.optimizer.lr=0.05",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
        ],
    )
    assert isinstance(cli.model.network, PrivateCNN)
    assert isinstance(cli.trainer.optimizers[0], torch.optim.SGD)
    assert cli.trainer.callback_metrics["gate/weight_mean"] == pytest.approx(0.5, abs=0.25)


def test_module_carries_float16_loss_scale_between_fits(tmp_path: Path) -> None:
    """Without it, a new Trainer would search the scale again in every phase."""
    state: dict[str, Any] = {}
    scales = []
    for _ in range(2):
        trainer = Trainer(
            accelerator="cpu",
            plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3))],
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = SupervisedModule(networks()[0], "classification")
        module.loss_scale = state
        trainer.fit(module, loader(n=32))  # four steps
        state = module.loss_scale
        scales.append((state["scale"], state["_growth_tracker"]))
    # Doubled after three steps; then one and two more make three again.
    assert scales == [(8.0, 1), (16.0, 2)]


def test_finite_teacher_of_several_exits_replaces_rows_of_each() -> None:
    student = ModelOutput(tuple(torch.randn(4, 3) for _ in range(3)))
    exits = tuple(torch.randn(4, 3) for _ in range(3))
    same = ModelOutput(exits).finite_teacher_of(student).exits
    assert all(torch.equal(one, other) for one, other in zip(same, exits, strict=True))
    exits[0][2, 1] = torch.nan
    first, second, last = ModelOutput(exits).finite_teacher_of(student).exits
    assert torch.equal(first[[0, 1, 3]], exits[0][[0, 1, 3]])
    assert torch.equal(first[2], student.exits[0][2])
    assert torch.equal(second, exits[1])
    assert torch.equal(last, exits[2])
    of_one = ModelOutput(exits).finite_teacher_of(ModelOutput(student.exits[-1:])).exits
    assert torch.equal(of_one[0][2], student.exits[-1][2])


def test_finite_teacher_of_replaces_only_broken_rows() -> None:
    student = ModelOutput((torch.randn(4, 3), torch.randn(4, 3)), torch.randn(4, 5))
    output, features = torch.randn(4, 3), torch.randn(4, 2)
    same = ModelOutput((output,), features).finite_teacher_of(student)
    assert torch.equal(same.output, output)
    assert same.features is not None
    assert torch.equal(same.features, features)
    output[1, 2], features[3, 0] = torch.nan, torch.inf
    teacher = ModelOutput((output,), features).finite_teacher_of(student)
    assert torch.equal(teacher.output[[0, 2]], output[[0, 2]])
    assert torch.equal(teacher.output[[1, 3]], student.output[[1, 3]])
    assert teacher.features is not None
    assert bool(teacher.features.isfinite().all())


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4, 2, 2)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e19])  # the square of 3e19 overflows
def test_finite_teacher_of_outputs_of_any_shape(shape: tuple[int, ...], value: float) -> None:
    student, output = torch.randn(shape), torch.randn(shape)
    output.view(3, -1)[1, -1] = value
    teacher = ModelOutput((output,)).finite_teacher_of(ModelOutput((student,))).output
    assert torch.equal(teacher[1], student[1])
    assert torch.equal(teacher[[0, 2]], output[[0, 2]])
    empty = ModelOutput((output[:0],))
    assert empty.finite_teacher_of(empty).output.shape == (0, *shape[1:])


def test_objective_module_adds_loss_terms_of_one_name() -> None:
    network, x, y = nn.Linear(3, 2), torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
    module = ObjectiveModule(network, [SupervisedLoss("classification")] * 2, "classification")
    torch.testing.assert_close(module.training_step((x, y), 0), 2 * nn.functional.cross_entropy(network(x), y))


def test_copy_parameters_has_each_name_of_a_shared_parameter() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    assert copy_parameters(network).keys() == network.state_dict().keys()
