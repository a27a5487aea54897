"""CAFEDistill: what travels, what stays, and the simpler method that it is at the ends of its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.functional import cosine_similarities, mixing_weights
from fedekd.methods import CAFEDistill, ClientOptions, FedPer, Update
from fedekd.methods.base import num_bytes
from fedekd.methods.cafedistill import ACTIVE

from .conftest import Federate, make_spec, weights


def options(**values: Any) -> ClientOptions:
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
    model = {"class_path": "fedekd.models.PrivateCNN"}
    return replace(ClientOptions(local_epochs=1, private_model=model, optimizer=sgd, exits=3), **values)


@pytest.fixture
def begun(federate: Federate) -> Orchestrator:
    """A federation of three clients and eight rounds before its first one."""
    run = federate(CAFEDistill(), client=options(), rounds=RoundOptions(rounds=8))
    run.method.init_server(run.spec)
    return run


def client_of(run: Orchestrator, number: int) -> Any:
    engine: Any = run.engine
    return engine.client(number)


def one_round(run: Orchestrator, participants: Sequence[int], round_idx: int) -> list[Update]:
    """By hand, verb by verb; the updates as they were sent."""
    broadcast, updates = run.method.broadcast(participants, round_idx), []
    for number in participants:
        client = client_of(run, number)
        run.method.receive(client, broadcast.to(number), round_idx)
        update = run.method.prepare_update(client, round_idx)
        updates.append(replace(update, state={name: tensor.clone() for name, tensor in update.state.items()}))
    run.method.aggregate(updates, round_idx)
    return updates


def test_without_conflict_and_distillation_it_is_fedper_with_shallow_heads_of_ones_own(federate: Federate) -> None:
    """With all clients in every round: who sits one out gets the head that waits for it, and FedPer's the newest."""
    ours = CAFEDistill(distillation_weight=0.0, schedule="all_on", spread=float("inf"), weights="uniform")
    theirs = FedPer(personal=["heads.0", "heads.1"], weights="uniform")
    rounds = RoundOptions(rounds=3)
    runs = [federate(method, client=options(), rounds=rounds) for method in (ours, theirs)]
    summaries = [run.run() for run in runs]
    assert summaries[0]["clients"] == summaries[1]["clients"]
    for name, tensor in weights(runs[0]).items():
        assert torch.equal(tensor, weights(runs[1])[name]), name


def test_what_travels_is_trunk_and_one_head_each_way(federate: Federate) -> None:
    run = federate(CAFEDistill(), client=options(), rounds=RoundOptions(rounds=2))
    run.run()
    network: Any = run.spec.build_model("private", "server")
    one_way = num_bytes(network.stages.state_dict()) + num_bytes(network.head.state_dict()) + 3  # a byte an exit
    assert run.progress.bytes_up == 2 * 3 * one_way
    assert run.progress.bytes_down == 3 * 3 * one_way


def test_shallow_heads_stay_and_idle_ones_do_not_move(begun: Orchestrator) -> None:
    broadcast = begun.method.broadcast([0, 1, 2], 0)
    sent = broadcast.to(1)
    assert not any(name.startswith(("heads.0", "heads.1")) for name in sent)
    assert broadcast.to(0)[ACTIVE].tolist() == [1, 0, 1]  # floor(2/3 * 2/8 * 9) = 1: one client's first exit
    assert sent[ACTIVE].tolist() == [0, 0, 1]
    client = client_of(begun, 1)
    before = {name: tensor.clone() for name, tensor in client.networks["private"].state_dict().items()}
    begun.method.receive(client, sent, 0)
    begun.method.prepare_update(client, 0)
    after = client.networks["private"].state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("heads.0", "heads.1")) for name in moved), moved
    assert not torch.equal(sent["heads.2.weight"], after["heads.2.weight"])


def test_heads_are_mixed_of_those_who_pull_alike(begun: Orchestrator) -> None:
    method: Any = begun.method
    initial = {name: tensor.clone() for name, tensor in method.mixed_head(0).items()}
    kept = [{name: update.state[name] for name in initial} for update in one_round(begun, [0, 1], 0)]
    changes = torch.stack([torch.cat([(head[n] - initial[n]).double().flatten() for n in head]) for head in kept])
    found = method.server_state["similarities"]
    torch.testing.assert_close(found[:2, :2], cosine_similarities(changes), rtol=0, atol=1e-6)
    assert found[2].tolist() == [0.0, 0.0, 0.0]
    for number in range(3):
        shares = mixing_weights(found[number, :2][None])[0].tolist()
        for name, mixed in method.mixed_head(number).items():
            wanted = sum(share * head[name].double() for share, head in zip(shares, kept, strict=True))
            torch.testing.assert_close(mixed.double(), wanted, rtol=0, atol=1e-6)
    uniform = {name: (kept[0][name] + kept[1][name]) / 2 for name in initial}
    torch.testing.assert_close(dict(method.mixed_head(2)), uniform)  # of a client that was never seen


def test_a_head_waits_for_who_sits_a_round_out(begun: Orchestrator) -> None:
    method: Any = begun.method
    one_round(begun, [0, 1, 2], 0)
    waiting = {name: tensor.clone() for name, tensor in method.mixed_head(0).items()}
    one_round(begun, [1, 2], 1)
    assert all(torch.equal(waiting[name], tensor) for name, tensor in method.mixed_head(0).items())
    assert not all(torch.equal(waiting[name], tensor) for name, tensor in method.mixed_head(1).items())


def test_what_a_client_does_next_does_not_reach_the_server(federate: Federate) -> None:
    run = federate(CAFEDistill(), client=options(), rounds=RoundOptions(rounds=2))
    run.run()
    held = run.method.server_state["heads"][0]["heads.2.weight"].clone()
    with torch.no_grad():
        client_of(run, 0).networks["private"].head.weight.add_(1.0)
    assert torch.equal(run.method.server_state["heads"][0]["heads.2.weight"], held)


def test_a_pair_that_does_not_meet_keeps_its_similarity(begun: Orchestrator) -> None:
    one_round(begun, [0, 1], 0)
    first = float(begun.method.server_state["similarities"][0, 1])
    one_round(begun, [1, 2], 1)
    table = begun.method.server_state["similarities"]
    assert float(table[0, 1]) == first != 0.0
    assert float(table[0, 2]) == 0.0
    assert float(table[1, 2]) == float(table[2, 1]) != 0.0
    assert sorted(begun.method.server_state["heads"]) == [0, 1, 2]


def test_each_exits_score_is_logged(federate: Federate) -> None:
    run = federate(CAFEDistill(), client=options(), rounds=RoundOptions(rounds=2))
    run.run()
    row = run.progress.history[-1]
    for exit_ in (1, 2, 3):
        clients = [row[f"client_{number}/exit_{exit_}/accuracy"] for number in range(3)]
        assert row[f"exit_{exit_}/accuracy"] == pytest.approx(sum(clients) / 3)
    assert row["exit_3/accuracy"] == pytest.approx(row["accuracy/mean"])


def test_which_exits_have_learned_is_logged(federate: Federate) -> None:
    run = federate(CAFEDistill(), client=options(), rounds=RoundOptions(rounds=8))
    run.run()
    first, *_, last = run.progress.history
    # floor(2/3 * 2/8 * 9) = 1 shallow exit in the first round; from the fourth on, without conflict, all of them.
    assert [first[f"exit_{exit_}/active"] for exit_ in (1, 2, 3)] == [pytest.approx(1 / 3), 0.0, 1.0]
    assert last["exit_3/active"] == 1.0
    assert all(last[f"exit_{exit_}/active"] >= first[f"exit_{exit_}/active"] for exit_ in (1, 2))


def test_what_clients_did_to_the_trunk_is_compared_by_its_weights_alone(federate: Federate) -> None:
    resnet = options(private_model={"class_path": "torchvision.models.resnet18"}, exits=2)
    run = federate(CAFEDistill(conflict="trunk_gradient"), client=resnet, rounds=RoundOptions(rounds=2))
    run.method.init_server(run.spec)
    before = {name: tensor.clone() for name, tensor in run.method.server_state["trunk"].items()}
    updates = one_round(run, [0, 1], 0)
    weights = [name for name, _ in run.spec.build_model("private", 0).named_parameters() if name in before]
    changes = [torch.cat([(u.state[n].double() - before[n].double()).flatten() for n in weights]) for u in updates]
    wanted = torch.nn.functional.cosine_similarity(*changes, dim=0)
    torch.testing.assert_close(run.method.server_state["similarities"][0, 1], wanted, rtol=0, atol=1e-9)


def test_a_head_that_diverged_begins_anew(begun: Orchestrator) -> None:
    client, sent = client_of(begun, 1), begun.method.broadcast([1], 0).to(1)
    initial = begun.spec.build_model("private", 1).state_dict()
    with torch.no_grad():
        client.networks["private"].heads[0].linear.weight[0, 0] = float("nan")
        client.networks["private"].heads[1].linear.weight.add_(1.0)
    kept = client.networks["private"].heads[1].linear.weight.clone()
    begun.method.receive(client, sent, 0)
    assert torch.equal(client.networks["private"].heads[0].linear.weight, initial["heads.0.linear.weight"])
    assert torch.equal(client.networks["private"].heads[1].linear.weight, kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spread": 0.0}, "method.spread is 0.0"),
        ({"order": "shallow"}, "method.order is 'shallow'.*did you mean 'shallow_first'"),
        ({"schedule": "on"}, "method.schedule is 'on'"),
        ({"conflict": "head"}, "method.conflict is 'head'"),
        ({"weights": "equal"}, "weights is 'equal'"),
        ({"temperature": 0.0}, "^method.temperature is 0.0"),
        ({"distillation_weight": -1.0}, "^method.distillation_weight is -1.0"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CAFEDistill(**arguments)


def test_what_it_cannot_federate_is_told() -> None:
    with pytest.raises(UserError, match="regression"):
        CAFEDistill().init_server(make_spec(task="regression", num_outputs=1))
    with pytest.raises(UserError, match=r"client\.exits"):
        CAFEDistill().init_server(make_spec())
    with pytest.raises(UserError, match="at least 2"):
        CAFEDistill().init_server(make_spec(client=options(exits=1)))


def test_the_learning_rate_decays_round_by_round(federate: Federate) -> None:
    three, one = (federate(FedPer(), client=options(lr_decay=1e-9), rounds=RoundOptions(rounds=n)) for n in (3, 1))
    for run in (three, one):
        run.run()
    # From the second round on hardly anything moves.
    for name, tensor in weights(three).items():
        torch.testing.assert_close(tensor, weights(one)[name], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"client\.lr_decay is 0"):
        options(lr_decay=0)
