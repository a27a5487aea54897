"""Noisy updates in federations: what is sent, that it repeats, and the account in the summary."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import MultiProcess, Orchestrator, RoundOptions, RoundRequest, Sequential
from fedekd.methods import ClientOptions, FedAvg, FedeKD, Local, Method
from fedekd.privacy import GaussianMechanism, mean_epsilon, update_epsilon

from .conftest import Federate


def first_updates(run: Orchestrator, privacy: GaussianMechanism | None, seeded: bool = True) -> dict[int, Any]:
    """Updates of round 0, by client."""
    run.method.init_server(run.spec)
    numbers = list(range(run.num_clients))
    request = RoundRequest(numbers, run.method.broadcast(numbers, 0), 0, True, privacy=privacy, has_seeded_noise=seeded)
    return {result.client: result.update for result in run.engine.run_clients(request)}


def change(update: Any, run: Orchestrator) -> torch.Tensor:
    received = run.method.broadcast([update.client], 0).to(update.client)
    return torch.cat([(update.state[name].double() - tensor.double()).flatten() for name, tensor in received.items()])


@pytest.mark.parametrize("method", [FedeKD, FedAvg])
def test_privacy_clips_the_change_of_each_client(federate: Federate, method: type[Method]) -> None:
    run = federate(method())
    plain = first_updates(run, None)
    clipped = first_updates(federate(method()), GaussianMechanism(0.0, 0.02))
    for number, update in plain.items():
        before, after = change(update, run), change(clipped[number], run)
        norm = float(before.norm())
        assert norm > 0.02
        torch.testing.assert_close(after, before * (0.02 / norm), rtol=0, atol=1e-7)
        assert clipped[number].num_samples == update.num_samples


def test_privacy_noise_differs_between_clients_and_repeats(federate: Federate) -> None:
    mechanism = GaussianMechanism(50.0, 0.01)
    run = federate()
    plain, clipped = first_updates(federate(), None), first_updates(federate(), GaussianMechanism(0.0, 0.01))
    noisy, again = first_updates(run, mechanism), first_updates(federate(), mechanism)
    unseeded = first_updates(federate(), mechanism, seeded=False)
    noise = {number: change(update, run) - change(clipped[number], run) for number, update in noisy.items()}
    for number, values in noise.items():
        assert float(values.std()) == pytest.approx(0.5, rel=0.02)
        torch.testing.assert_close(change(noisy[number], run), change(again[number], run), rtol=0, atol=0)
        assert not torch.equal(change(noisy[number], run), change(unseeded[number], run))
    assert abs(float(torch.corrcoef(torch.stack([noise[0], noise[1]]))[0, 1])) < 0.02
    # What stays at the client has no noise.
    other = federate()
    first_updates(other, None)
    assert all(
        torch.equal(tensor, other.engine.clients[0].networks["proxy"].state_dict()[name])  # type: ignore[attr-defined]
        for name, tensor in run.engine.clients[0].networks["proxy"].state_dict().items()  # type: ignore[attr-defined]
    )
    assert set(plain) == set(noisy)


def test_privacy_without_effect_changes_no_result(federate: Federate) -> None:
    plain, clipped = federate().run(), federate(privacy=GaussianMechanism(0.0, 1e6)).run()
    account = clipped.pop("privacy")
    assert account["epsilon"] == [None] * 3
    assert "privacy" not in plain
    for summary in (plain, clipped):
        summary.pop("seconds")
    assert clipped == plain


def test_run_aggregates_noisy_updates(federate: Federate) -> None:
    """The mean of three updates has the deviation 0.5 / sqrt(3)."""
    runs = [federate(privacy=GaussianMechanism(noise, 0.01), rounds=RoundOptions(rounds=1)) for noise in (0.0, 50.0)]
    for run in runs:
        run.run()
    plain, noisy = (run.method.server_state for run in runs)
    noise = torch.cat([(noisy[name] - tensor).flatten() for name, tensor in plain.items()])
    assert float(noise.std()) == pytest.approx(0.5 / 3**0.5, rel=0.02)


@pytest.mark.slow
def test_privacy_noise_is_the_same_in_other_processes(federate: Federate) -> None:
    mechanism = GaussianMechanism(0.1, 0.5)
    summaries = [federate(privacy=mechanism, engine=engine).run() for engine in (Sequential(), MultiProcess(2))]
    for summary in summaries:
        summary.pop("seconds")
    assert summaries[0] == summaries[1]


def test_summary_has_epsilon_per_client_over_all_rounds(federate: Federate) -> None:
    rounds = RoundOptions(rounds=4, participation=0.67)
    run = federate(privacy=GaussianMechanism(0.5, 0.2, 1e-4), rounds=rounds)
    account = run.run()["privacy"]
    updates = [sum(number in run._participants(round_idx) for round_idx in range(4)) for number in range(3)]
    assert sum(updates) == 8
    assert len(set(updates)) > 1
    assert account == {
        "mechanism": "gaussian",
        "noise_multiplier": 0.5,
        "clipping_norm": 0.2,
        "rounds": 4,
        "delta": 1e-4,
        "noise": "seeded",
        "updates": updates,
        "epsilon": [update_epsilon(0.5, count, 1e-4) for count in updates],
        "epsilon_of_mean": [mean_epsilon(0.5, [2] * count, 1e-4) for count in updates],
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [(FedeKD, {"update_loss_rate": 0.5}), (partial(FedAvg, weights="samples"), {})],
)
def test_summary_has_no_epsilon_of_a_mean_that_is_not_uniform(
    federate: Federate, method: Any, options: dict[str, Any]
) -> None:
    rounds = RoundOptions(rounds=2, **options)
    account = federate(method(), privacy=GaussianMechanism(0.1, 0.1), rounds=rounds).run()["privacy"]
    assert account["epsilon_of_mean"] is None
    assert account["epsilon"] == [update_epsilon(0.1, 2, 1e-5)] * 3


def test_resume_continues_with_the_same_noise_and_no_other(federate: Federate, tmp_path: Path) -> None:
    def run(rounds: int, output: Path | None, noise: float = 0.1) -> dict[str, Any]:
        options = RoundOptions(rounds=rounds)
        return federate(privacy=GaussianMechanism(noise, 0.5), rounds=options, output=output).run()

    whole = run(2, None)
    stopped = federate(privacy=GaussianMechanism(0.1, 0.5), output=tmp_path / "run")
    original = stopped._run_round

    def fail(round_idx: int) -> list[int]:
        if round_idx == 1:
            raise RuntimeError("stop")
        return original(round_idx)

    stopped._run_round = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"):
        stopped.run()
    with pytest.raises(UserError, match="noise_multiplier"):
        run(2, tmp_path / "run", noise=0.2)
    resumed = run(2, tmp_path / "run")
    for summary in (whole, resumed):
        summary.pop("seconds")
    assert resumed == whole


def test_privacy_refuses_methods_and_models_that_it_cannot_protect(federate: Federate) -> None:
    mechanism = GaussianMechanism()
    with pytest.raises(UserError, match="privacy: expected a method whose clients send tensors, got 'Local'"):
        federate(Local(), privacy=mechanism).run()
    resnet = {"class_path": "torchvision.models.resnet18"}
    client = ClientOptions(local_epochs=1, proxy_model=resnet)
    with pytest.raises(UserError, match=r"privacy: expected a message of floating-point tensors, got '.*num_batches"):
        federate(privacy=mechanism, client=client).run()
