"""CAFEDistill: exchanged and personal parts, mixing, and equality with FedPer without its terms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.errors import UserError
from fedekd.federation import Orchestrator, RoundOptions
from fedekd.functional import cosine_similarities, mixing_weights
from fedekd.methods import CAFEDistill, ClientOptions, FedAvg, FedPer
from fedekd.methods.base import state_dict_bytes
from fedekd.methods.cafedistill import ACTIVE
from fedekd.methods.serving import CANDIDATE, Candidate
from fedekd.modules import ObjectiveModule, predict
from tests.federation.runs import weights

from .conftest import Federate, client_of, make_spec, one_round

CLASSES = 3
HEAD = ("heads.2.weight", "heads.2.bias")


def options(**values: Any) -> ClientOptions:
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
    model = {"class_path": "fedekd.models.PrivateCNN"}
    return replace(ClientOptions(local_epochs=1, private_model=model, optimizer=sgd, exits=3), **values)


@pytest.fixture
def started_run(federate: Federate) -> Orchestrator:
    """Run with three clients and eight rounds before its first round."""
    run = federate(CAFEDistill("paper"), client=options(), rounds=RoundOptions(rounds=8))
    run.method.init_server(run.spec)
    return run


def test_cafedistill_without_mixing_and_distillation_equals_fedper(federate: Federate) -> None:
    """Only with full participation: FedPer sends the newest head to a client that skipped a round."""
    ours = CAFEDistill("paper", distillation_weight=0.0, schedule="all_on", spread=float("inf"), weights="uniform")
    theirs = FedPer(personal=["heads.0", "heads.1"], weights="uniform")
    rounds = RoundOptions(rounds=3)
    runs = [federate(method, client=options(), rounds=rounds) for method in (ours, theirs)]
    summaries = [run.run() for run in runs]
    assert summaries[0]["clients"] == summaries[1]["clients"]
    for name, tensor in weights(runs[0]).items():
        assert torch.equal(tensor, weights(runs[1])[name]), name


def test_cafedistill_exchanges_trunk_and_one_head(federate: Federate) -> None:
    run = federate(CAFEDistill("paper"), client=options(), rounds=RoundOptions(rounds=2))
    run.run()
    network: Any = run.spec.build_model("private", "server")
    one_way = state_dict_bytes(network.stages.state_dict()) + state_dict_bytes(network.head.state_dict()) + 3
    assert run.progress.bytes_up == 2 * 3 * one_way
    assert run.progress.bytes_down == 3 * 3 * one_way


def test_cafedistill_shallow_heads_are_personal_and_inactive_ones_unchanged(started_run: Orchestrator) -> None:
    broadcast = started_run.method.broadcast([0, 1, 2], 0)
    sent = broadcast.to(1)
    assert not any(name.startswith(("heads.0", "heads.1")) for name in sent)
    assert broadcast.to(0)[ACTIVE].tolist() == [1, 0, 1]  # floor(2/3 * 2/8 * 9) = 1: the first exit of one client
    assert sent[ACTIVE].tolist() == [0, 0, 1]
    client = client_of(started_run, 1)
    before = {name: tensor.clone() for name, tensor in client.networks["private"].state_dict().items()}
    started_run.method.receive(client, sent, 0)
    started_run.method.prepare_update(client, 0)
    after = client.networks["private"].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("heads.0", "heads.1")) for name in changed), changed
    assert not torch.equal(sent["heads.2.weight"], after["heads.2.weight"])


def test_cafedistill_mixes_heads_by_similarity(started_run: Orchestrator) -> None:
    method: Any = started_run.method
    initial = {name: tensor.clone() for name, tensor in method.mixed_head(0).items()}
    sent_heads = [{name: update.state[name] for name in initial} for update in one_round(started_run, [0, 1], 0)]
    changes = torch.stack([torch.cat([(head[n] - initial[n]).double().flatten() for n in head]) for head in sent_heads])
    similarities = method.server_state["similarities"]
    torch.testing.assert_close(similarities[:2, :2], cosine_similarities(changes), rtol=0, atol=1e-6)
    assert similarities[2].tolist() == [0.0, 0.0, 0.0]
    for number in range(3):
        shares = mixing_weights(similarities[number, :2][None])[0].tolist()
        for name, mixed in method.mixed_head(number).items():
            wanted = sum(share * head[name].double() for share, head in zip(shares, sent_heads, strict=True))
            torch.testing.assert_close(mixed.double(), wanted, rtol=0, atol=1e-6)
    uniform = {name: (sent_heads[0][name] + sent_heads[1][name]) / 2 for name in initial}
    torch.testing.assert_close(dict(method.mixed_head(2)), uniform)  # the default head of a new client


def test_cafedistill_absent_client_keeps_its_mixed_head(started_run: Orchestrator) -> None:
    method: Any = started_run.method
    one_round(started_run, [0, 1, 2], 0)
    before = {name: tensor.clone() for name, tensor in method.mixed_head(0).items()}
    one_round(started_run, [1, 2], 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in method.mixed_head(0).items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in method.mixed_head(1).items())


def test_cafedistill_server_state_shares_no_memory_with_clients(federate: Federate) -> None:
    run = federate(CAFEDistill("paper"), client=options(), rounds=RoundOptions(rounds=2))
    run.run()
    head = run.method.server_state["heads"][0]["heads.2.weight"].clone()
    with torch.no_grad():
        client_of(run, 0).networks["private"].head.weight.add_(1.0)
    assert torch.equal(run.method.server_state["heads"][0]["heads.2.weight"], head)


def test_cafedistill_pair_without_common_round_keeps_similarity(started_run: Orchestrator) -> None:
    one_round(started_run, [0, 1], 0)
    first = float(started_run.method.server_state["similarities"][0, 1])
    one_round(started_run, [1, 2], 1)
    table = started_run.method.server_state["similarities"]
    assert float(table[0, 1]) == first != 0.0
    assert float(table[0, 2]) == 0.0
    assert float(table[1, 2]) == float(table[2, 1]) != 0.0
    assert sorted(started_run.method.server_state["heads"]) == [0, 1, 2]


def test_cafedistill_logs_score_of_every_exit(federate: Federate) -> None:
    run = federate(CAFEDistill("paper"), client=options(), rounds=RoundOptions(rounds=2))
    run.run()
    row = run.progress.history[-1]
    for exit_ in (1, 2, 3):
        clients = [row[f"client_{number}/exit_{exit_}/accuracy"] for number in range(3)]
        assert row[f"exit_{exit_}/accuracy"] == pytest.approx(sum(clients) / 3)
    assert row["exit_3/accuracy"] == pytest.approx(row["accuracy/mean"])


def test_cafedistill_logs_active_exits(federate: Federate) -> None:
    run = federate(CAFEDistill("paper"), client=options(), rounds=RoundOptions(rounds=8))
    run.run()
    first, *_, last = run.progress.history
    # floor(2/3 * 2/8 * 9) = 1 shallow exit in the first round; from the fourth on, without conflict, all of them.
    assert [first[f"exit_{exit_}/active"] for exit_ in (1, 2, 3)] == [pytest.approx(1 / 3), 0.0, 1.0]
    assert last["exit_3/active"] == 1.0
    assert all(last[f"exit_{exit_}/active"] >= first[f"exit_{exit_}/active"] for exit_ in (1, 2))


def test_cafedistill_trunk_gradient_compares_weights_without_buffers(federate: Federate) -> None:
    resnet = options(private_model={"class_path": "torchvision.models.resnet18"}, exits=2)
    run = federate(CAFEDistill("paper", conflict="trunk_gradient"), client=resnet, rounds=RoundOptions(rounds=2))
    run.method.init_server(run.spec)
    before = {name: tensor.clone() for name, tensor in run.method.server_state["trunk"].items()}
    updates = one_round(run, [0, 1], 0)
    weights = [name for name, _ in run.spec.build_model("private", 0).named_parameters() if name in before]
    changes = [torch.cat([(u.state[n].double() - before[n].double()).flatten() for n in weights]) for u in updates]
    wanted = torch.nn.functional.cosine_similarity(*changes, dim=0)
    torch.testing.assert_close(run.method.server_state["similarities"][0, 1], wanted, rtol=0, atol=1e-9)


def test_cafedistill_with_shared_heads_and_nothing_else_equals_fedavg(federate: Federate) -> None:
    ours = CAFEDistill(
        label_prior=False, distillation_weight=0.0, reduction="mean", weights="uniform", finetune_epochs=0
    )
    rounds = RoundOptions(rounds=3, participation=0.6)
    runs = [federate(method, client=options(), rounds=rounds) for method in (ours, FedAvg())]
    assert runs[0].run()["clients"] == runs[1].run()["clients"]
    for name, tensor in weights(runs[0]).items():
        assert torch.equal(tensor, weights(runs[1])[name]), name


def test_cafedistill_shared_heads_are_all_that_travels(federate: Federate) -> None:
    run = federate(CAFEDistill(), client=options(), rounds=RoundOptions(rounds=2))
    run.run()
    size = state_dict_bytes(run.spec.build_model("private", "server").state_dict())
    assert (run.progress.bytes_up, run.progress.bytes_down) == (2 * 3 * size, 3 * 3 * size)


def literal_loss(client: Any, received: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of the corrected variant with shared heads, by its equations, in float64."""
    network, counts = client.networks["private"], torch.bincount(client.targets("train"), minlength=CLASSES).double()
    log_prior = ((counts + 0.01) / (counts.sum() + 0.01 * CLASSES)).log()
    hidden, exits = x, []
    for stage, head in zip(network.stages, network.heads, strict=True):
        hidden = stage(hidden)
        exits.append(head(hidden) + log_prior)
    loss = -sum(z.log_softmax(1)[range(len(y)), y].mean() for z in exits)
    z = hidden.detach() @ received["heads.2.weight"].T + received["heads.2.bias"] + log_prior
    q = (z / 2).softmax(1)
    for student in exits[:-1]:
        loss = loss + 0.1 * 2**2 * (q * (q.log() - (student / 2).log_softmax(1))).sum(1).mean()
    return loss


def test_cafedistill_corrected_loss_equals_its_equations(federate: Federate) -> None:
    run = federate(CAFEDistill(), client=options(), precision="64-true")
    run.method.init_server(run.spec)
    client, generator = client_of(run, 1), torch.Generator().manual_seed(0)
    received = {name: tensor.clone() for name, tensor in run.method.broadcast([1], 0).to(1).items()}
    run.method.receive(client, received, 0)
    network, method = client.networks["private"], cast(CAFEDistill, run.method)
    with torch.no_grad():  # the live head is not the received one
        network.head.weight.add_(torch.randn(network.head.weight.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(6, *run.spec.input_shape, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    output = predict(network, x, with_features=True)
    loss = torch.stack([term(output, None, y, lambda *_: None) for term in method.loss_terms(client, network)]).sum()
    wanted = literal_loss(client, received, x, y)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(value, [*network.parameters()], retain_graph=True) for value in (loss, wanted)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_cafedistill_serves_shared_heads_with_the_prior_of_the_client(federate: Federate) -> None:
    run = federate(CAFEDistill(), client=options(), precision="64-true")
    run.run()
    client = client_of(run, 2)
    served = client.predict(client.served_role, "test").exits
    counts = torch.bincount(client.targets("train"), minlength=CLASSES).double()
    log_prior = ((counts + 1) / (counts.sum() + CLASSES)).log()
    for found, logits in zip(served, client.predict("private", "test").exits, strict=True):
        torch.testing.assert_close(found, (logits + log_prior).log_softmax(1), rtol=0, atol=1e-12)


def test_cafedistill_finetunes_all_exits_after_the_last_round(federate: Federate) -> None:
    tuned, plain = (federate(CAFEDistill(finetune_epochs=n), client=options()) for n in (2, 0))
    for run in (tuned, plain):
        run.run()
    # The local baseline has no epochs of fine-tuning.
    assert [client_of(tuned, number).supervised_epochs for number in range(3)] == [2, 2, 2]
    for name, tensor in plain.method.server_state["trunk"].items():
        assert torch.equal(tuned.method.server_state["trunk"][name], tensor), name
    # By hand: two more epochs of the same loss at a tenth of the learning rate.
    client = client_of(plain, 1)
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.005, "momentum": 0.9}}
    client.spec = replace(client.spec, client=options(optimizer=sgd))
    method = cast(CAFEDistill, plain.method)
    module = ObjectiveModule(
        client.networks["private"],
        method.loss_terms(client, client.networks["private"]),
        "classification",
        client.spec.optimizer,
        with_features=True,
    )
    client.train_supervised(module, 2, epochs=2)
    for name, tensor in client.networks["private"].state_dict().items():
        torch.testing.assert_close(weights(tuned)[f"1/{name}"], tensor, rtol=1e-6, atol=1e-7)


def test_cafedistill_personal_head_stays_and_the_mixed_one_teaches(federate: Federate) -> None:
    run = federate(CAFEDistill(heads="personal"), client=options(), rounds=RoundOptions(rounds=8))
    run.method.init_server(run.spec)
    method: Any = run.method
    first = {update.client: update.state for update in one_round(run, [0, 1, 2], 0)}
    initial = run.spec.build_model("private", "server").state_dict()
    changes = [torch.cat([(state[n] - initial[n]).double().flatten() for n in HEAD]) for state in first.values()]
    wanted = cosine_similarities(torch.stack(changes))
    torch.testing.assert_close(method.server_state["similarities"], wanted, rtol=0, atol=1e-6)
    sent = method.broadcast([0], 1).to(0)
    client = client_of(run, 0)
    method.receive(client, sent, 1)
    for name in HEAD:
        assert torch.equal(client.networks["private"].state_dict()[name], first[0][name])
        assert torch.equal(client.method_state["teacher_head"][name.split(".")[2]], sent[name])
        assert not torch.equal(sent[name], first[0][name])
    before = {number: dict(method.mixed_head(number)) for number in (0, 1)}
    second = one_round(run, [0, 1], 1)
    changes = [torch.cat([(u.state[n] - before[u.client][n]).double().flatten() for n in HEAD]) for u in second]
    wanted = torch.nn.functional.cosine_similarity(*changes, dim=0)
    torch.testing.assert_close(method.server_state["similarities"][0, 1], wanted, rtol=0, atol=1e-6)


def test_client_load_received_reinitialises_nonfinite_head(started_run: Orchestrator) -> None:
    client, sent = client_of(started_run, 1), started_run.method.broadcast([1], 0).to(1)
    initial = started_run.spec.build_model("private", 1).state_dict()
    with torch.no_grad():
        client.networks["private"].heads[0].linear.weight[0, 0] = float("nan")
        client.networks["private"].heads[1].linear.weight.add_(1.0)
    personal = client.networks["private"].heads[1].linear.weight.clone()
    started_run.method.receive(client, sent, 0)
    assert torch.equal(client.networks["private"].heads[0].linear.weight, initial["heads.0.linear.weight"])
    assert torch.equal(client.networks["private"].heads[1].linear.weight, personal)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variant": "published"}, "method.variant: expected one of paper, corrected, got 'published'"),
        ({"heads": "own"}, "method.heads: expected one of mixed, personal, shared, got 'own'"),
        ({"teacher_head": "ema"}, "method.teacher_head: .* got 'ema'"),
        ({"reduction": "none"}, "method.reduction: .* got 'none'"),
        ({"spread": 0.0}, "method.spread: .* got 0.0"),
        ({"order": "shallow"}, "method.order: .* got 'shallow'. Did you mean 'shallow_first'"),
        ({"schedule": "on"}, "method.schedule: .* got 'on'"),
        ({"conflict": "head"}, "method.conflict: .* got 'head'"),
        ({"weights": "equal"}, "weights: expected one of uniform, samples, got 'equal'"),
        ({"temperature": 0.0}, "^method.temperature: .* got 0.0"),
        ({"distillation_weight": -1.0}, "^method.distillation_weight: .* got -1.0"),
        ({"finetune_epochs": -1}, "^method.finetune_epochs: expected at least 0, got -1"),
        ({"finetune_lr_factor": 0.0}, "^method.finetune_lr_factor: expected a finite number above 0, got 0.0"),
    ],
)
def test_cafedistill_invalid_argument_raises_user_error(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CAFEDistill(**arguments)


def test_cafedistill_invalid_specification_raises_user_error() -> None:
    with pytest.raises(UserError, match="regression"):
        CAFEDistill().init_server(make_spec(task="regression", num_outputs=1))
    with pytest.raises(UserError, match=r"client\.exits"):
        CAFEDistill().init_server(make_spec())
    with pytest.raises(UserError, match="at least 2"):
        CAFEDistill().init_server(make_spec(client=options(exits=1)))


def test_lr_decay_reduces_learning_rate_per_round(federate: Federate) -> None:
    three, one = (federate(FedPer(), client=options(lr_decay=1e-9), rounds=RoundOptions(rounds=n)) for n in (3, 1))
    for run in (three, one):
        run.run()
    # From the second round on, weights hardly change.
    for name, tensor in weights(three).items():
        torch.testing.assert_close(tensor, weights(one)[name], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"client\.lr_decay: .* got 0"):
        options(lr_decay=0)


def test_exit_candidate_of_cafedistill_has_the_label_prior_of_what_is_served(
    federate: Federate, tmp_path: Path
) -> None:
    rule = DoNoHarm(rule="better", candidates=("exit_1",))
    run = federate(CAFEDistill(), client=options(), do_no_harm=rule, output=tmp_path / "run")
    run.run()
    again = federate(CAFEDistill(), client=options(), do_no_harm=rule, output=tmp_path / "run")
    for client, loaded in zip((client_of(run, number) for number in range(3)), again.load_clients(), strict=True):
        client.use_candidate(Candidate("exit_1", client.serving))
        first = client.predict(client.served_role, "test").exits[0]
        assert torch.equal(client.predict(CANDIDATE, "test").output, first)
        if loaded.candidate is not None:
            assert torch.equal(loaded.predict(CANDIDATE, "test").output, first)
