"""Schedulers, callbacks, clipping and accumulation: of a client, and of whole runs that are stopped and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from fedekd.data import FederatedDataModule, TensorBatches
from fedekd.errors import UserError
from fedekd.federation import BaselineOptions, MultiProcess, Orchestrator, RoundOptions
from fedekd.methods import FML, Client, ClientOptions, FedAvg, FedeKD, FedRep, FedType, Local, Method, ProxyEnsemble
from fedekd.modules import SupervisedModule, TrainerFactory
from fedekd.seeding import derive_seed
from tests.federation.runs import BackwardsEngine, StopAfter, StoppedError, assert_equal_weights, repeatable, weights

from .conftest import Federate, make_spec

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
EXPONENTIAL = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.7}}
CYCLIC = {
    "class_path": "torch.optim.lr_scheduler.CyclicLR",
    "init_args": {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 3},
}


class Damp(Callback):
    """Halves the gradient of each step of a phase once more: state that is shared would show."""

    def __init__(self) -> None:
        self.factor = 1.0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.factor *= 0.5
        for parameter in pl_module.network.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.factor


#: Options of the client and of the trainer.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "callbacks": ({}, {"callbacks": f"{__name__}.Damp"}),
    "clipping": ({}, {"gradient_clip_val": 0.05}),
    "clipping, lean": ({}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "loop": "lean"}),
    "accumulation": ({}, {"accumulate_grad_batches": 2}),
    "epochs": ({"scheduler": EXPONENTIAL, "lr_decay": 0.5}, {}),
    "steps, lean": ({"scheduler": CYCLIC, "scheduler_interval": "step"}, {"loop": "lean"}),
    "momentum": ({"scheduler": EXPONENTIAL, "optimizer": SGD}, {}),
    "best round": ({"scheduler": {**EXPONENTIAL, "init_args": {"gamma": 100.0}}}, {}),
}
RUNS: list[tuple[str, type[Method]]] = [
    *((name, FedeKD) for name in OPTIONS),
    *(("steps, lean", method) for method in (Local, FedAvg, FedType, FML, ProxyEnsemble)),
    ("momentum", FML),
    *(("best round", method) for method in (FedAvg, ProxyEnsemble)),
]


def parts(name: str, **options: Any) -> dict[str, Any]:
    client, trainer = OPTIONS[name]
    model = {"class_path": "fedekd.models.ProxyCNN"}
    return {
        "client": ClientOptions(**{"local_epochs": 1, "private_model": model, **client, **options}),
        "trainer": TrainerFactory(accelerator="cpu", precision="32-true", threads=1, **trainer),
        "rounds": RoundOptions(rounds=2, select_round="best" if name == "best round" else "last"),
    }


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_resumed_run_with_other_client_order_is_identical(
    name: str, method: type[Method], federate: Federate, tmp_path: Path
) -> None:
    whole = federate(method(), **parts(name))
    summary = whole.run()
    # Three phases of the local baselines (more with a control), then in the middle of round 1.
    stop = 9 if method is Local else 12
    with pytest.raises(StoppedError):
        federate(method(), **parts(name), output=tmp_path, observer=StopAfter(phases=stop)).run()
    again = federate(method(), **parts(name), output=tmp_path, engine=BackwardsEngine)
    assert repeatable(again.run()) == repeatable(summary)
    assert_equal_weights(weights(whole), weights(again))
    plain = federate(method(), client=replace(parts(name)["client"], scheduler=None, lr_decay=1.0))
    plain.run()
    ours, theirs = weights(whole), weights(plain)
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["callbacks", "best round"])
def test_processes_give_the_numbers_of_one(name: str, federate: Federate, tmp_path: Path) -> None:
    baseline = BaselineOptions(control=True, tune=True, learning_rates=(1e-2,), epochs=2)
    runs = [federate(FedeKD(), **parts(name), engine=engine, baseline=baseline) for engine in (None, MultiProcess(2))]
    summaries = [run.run() for run in runs]
    assert repeatable(summaries[1]) == repeatable(summaries[0])


def linear_client(blobs: FederatedDataModule, **options: Any) -> Client:
    trainer = TrainerFactory(accelerator="cpu", precision="64-true", threads=1)
    spec = make_spec(client=ClientOptions(local_epochs=2, optimizer=SGD, **options), trainer=trainer)
    client = Client(1, blobs.clients[1], blobs.samples, spec)
    torch.manual_seed(0)
    client.networks["private"] = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    return client


def batches_of(client: Client, round_idx: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(derive_seed(0, client.number, round_idx, "private", epoch))
    samples = client.samples
    assert isinstance(samples.inputs, Tensor)
    for x, y in TensorBatches(samples.inputs, samples.targets, client.splits.train, 8, generator=generator):
        yield x.double().flatten(1), y


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("carry", [True, False])
def test_scheduled_training_equals_literal_loop(interval: str, carry: bool, blobs: FederatedDataModule) -> None:
    """SGD with momentum over two rounds; without carried optimizer the momentum starts new, the schedule does not."""
    client = linear_client(blobs, scheduler=EXPONENTIAL, scheduler_interval=interval, lr_decay=0.5)
    weight, bias = (parameter.detach().clone() for parameter in client.networks["private"].parameters())
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    rate = 0.1
    velocity: list[Tensor | None] = [None, None]
    for round_idx in (1, 2):
        if not carry:
            velocity = [None, None]
        for epoch in range(2):
            for x, y in batches_of(client, round_idx, epoch):
                loss = nn.functional.cross_entropy(x @ weight.T + bias, y)
                gradients = torch.autograd.grad(loss, parameters)
                for index, gradient in enumerate(gradients):
                    old = velocity[index]
                    velocity[index] = gradient if old is None else 0.9 * old + gradient
                    parameters[index].data -= rate * 0.5 ** (round_idx - 1) * velocity[index]
                rate *= 0.7 if interval == "step" else 1.0
            rate *= 0.7 if interval == "epoch" else 1.0
    for _ in range(2):
        module = SupervisedModule(client.networks["private"], optimizer=client.spec.optimizer)
        client.train_supervised(module, carry_optimizer=carry)
    trained = client.networks["private"][1]
    torch.testing.assert_close(trained.weight, weight, rtol=0, atol=1e-13)
    torch.testing.assert_close(trained.bias, bias, rtol=0, atol=1e-13)
    groups = client.scheduler_states["private"]["groups"]
    assert groups[0]["lr"] == pytest.approx(rate, rel=1e-12)


def test_schedule_of_another_role_goes_on_with_a_new_optimizer(blobs: FederatedDataModule) -> None:
    client = linear_client(blobs, scheduler=EXPONENTIAL)

    def steps(**options: Any) -> int:
        module = SupervisedModule(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), optimizer=client.spec.optimizer
        )
        client.train("proxy", module, 1, **options)
        assert module.schedule is not None
        assert module.schedule.scheduler is not None
        return module.schedule.scheduler.last_epoch

    assert [steps(), steps()] == [2, 4]
    client.load_state_dict(client.state_dict())
    assert [steps(carry_optimizer=True), steps(), steps(epochs=1)] == [6, 8, 9]


def test_client_without_scheduler_has_no_state_of_one(blobs: FederatedDataModule) -> None:
    client = linear_client(blobs)
    client.train_supervised(SupervisedModule(client.networks["private"], optimizer=client.spec.optimizer))
    assert "scheduler_states" not in client.state_dict()
    client.load_state_dict(client.state_dict())
    assert client.scheduler_states == {}


def test_hash_of_options_that_are_off_is_that_of_before() -> None:
    values = make_spec().hash_dict()
    assert not {"scheduler", "scheduler_interval"} & values["client"].keys()
    assert set(values["trainer"]) == {"accelerator", "precision", "threads", "channels_last", "loop", "capture"}
    unused = make_spec(
        client=ClientOptions(scheduler_interval="step"),
        trainer=replace(make_spec().trainer, gradient_clip_algorithm="value", callbacks=[]),
    )
    assert unused.hash_dict() == values


class NotPlain(torch.optim.lr_scheduler.StepLR):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.log = {object()}
        super().__init__(optimizer, 1)


def no_scheduler(optimizer: torch.optim.Optimizer) -> Any:
    return optimizer


def torch_scheduler(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": init_args}


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (torch_scheduler("ReduceLROnPlateau"), "expected a scheduler that needs no metric, .* no validation batches"),
        (
            torch_scheduler("StepLR", step_size=1, gamma="a"),
            r"\.gamma: expected a value that .*StepLR accepts",
        ),
        (torch_scheduler("StepLR", step_size=1, gama=1), r"\.gama: .*unexpected keyword"),
        (torch_scheduler("StepLR", step_size=0), "expected arguments that .*StepLR accepts"),
        (torch_scheduler("CyclicLR", base_lr=1e-3, max_lr=1.0), None),
        (torch_scheduler("LambdaLR", lr_lambda="no.such.function"), "No module named 'no'"),
        (torch_scheduler("OneCycleLR", max_lr=1.0, total_steps=9), None),
        ({"class_path": f"{__name__}.NotPlain"}, "expected a state_dict of numbers, text and tensors in NotPlain"),
        ({"class_path": f"{__name__}.no_scheduler"}, "expected a scheduler that needs no metric"),
        ({"class_path": "no.Such"}, "No module named 'no'"),
        ({}, "expected class_path and init_args, or null"),
    ],
)
def test_scheduler_is_checked_with_the_options(scheduler: Any, words: str | None) -> None:
    if words is None:
        ClientOptions(scheduler=scheduler)
        return
    with pytest.raises(UserError, match=rf"^client\.scheduler.*{words}") as error:
        ClientOptions(scheduler=scheduler)
    assert "\n" not in str(error.value)


def test_schedule_with_fewer_steps_than_epochs_is_refused_before_training(federate: Federate) -> None:
    def run(steps: int) -> None:
        federate(Local(), client=ClientOptions(scheduler=torch_scheduler("OneCycleLR", max_lr=1.0, total_steps=steps)))

    run(4)  # two rounds of two epochs
    with pytest.raises(
        UserError, match=r"client\.scheduler: expected a schedule of at least 4 epochs, got .* total steps is 3"
    ):
        run(3)


@pytest.mark.parametrize(
    ("method", "options", "steps"),
    [
        (FedAvg(finetune_epochs=3), {}, 7),
        (FedRep(head_epochs=3), {}, 6),
        (FedeKD(proxy_epochs=4), {}, 8),
        (ProxyEnsemble(proxy_epochs=3), {}, 6),
        (FedeKD(), {"baseline": BaselineOptions(tune=True)}, 8),
        (FedeKD(), {"baseline": BaselineOptions(tune=True, epochs=5)}, 4),
    ],
)
def test_longest_schedule_of_a_method_is_checked_before_training(
    method: Method, options: dict[str, Any], steps: int, federate: Federate
) -> None:
    def run(total: int) -> None:
        client = ClientOptions(scheduler=torch_scheduler("OneCycleLR", max_lr=1.0, total_steps=total))
        federate(method, client=client, **options)

    run(steps)
    with pytest.raises(UserError, match=rf"client\.scheduler: .* total steps is {steps - 1}"):
        run(steps - 1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_longest_schedule_in_steps_is_checked_before_training(accumulate: int, federate: Federate) -> None:
    def run(total: int) -> Orchestrator:
        scheduler = torch_scheduler("OneCycleLR", max_lr=1e-3, total_steps=total)
        client = ClientOptions(scheduler=scheduler, scheduler_interval="step", local_epochs=1)
        trainer = TrainerFactory(accelerator="cpu", precision="32-true", threads=1, accumulate_grad_batches=accumulate)
        return federate(Local(), client=client, trainer=trainer, rounds=RoundOptions(rounds=1))

    largest = max(len(splits.train) for splits in run(1000).data.clients)
    assert largest % 8 > 1
    steps = -(-(largest // 8 + 1) // accumulate)
    run(steps).run()
    with pytest.raises(UserError, match=rf"client\.scheduler: .* total steps is {steps - 1}"):
        run(steps - 1)


def test_clipping_in_mixed_precision_needs_the_plain_optimizer() -> None:
    adam = {"class_path": "torch.optim.Adam", "init_args": {"fused": True}}
    for precision, clip, fused in (("bf16-mixed", 1.0, None), ("32-true", 1.0, True), ("bf16-mixed", None, True)):
        trainer = TrainerFactory(accelerator="cpu", precision=precision, threads=1, gradient_clip_val=clip)  # type: ignore[arg-type]
        optimizer = make_spec(trainer=trainer).optimizer([nn.Parameter(torch.zeros(2))])
        assert optimizer.defaults["fused"] is fused
    trainer = TrainerFactory(accelerator="cpu", precision="bf16-mixed", threads=1, gradient_clip_val=1.0)
    with pytest.raises(UserError, match=r"client\.optimizer\.fused: expected null or false with --trainer\.gradient"):
        make_spec(client=ClientOptions(optimizer=adam), trainer=trainer)
