"""Do-no-harm among candidates in federations: choice, stored state, engines, resume, and invalid options."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fedekd.data import FederatedDataModule
from fedekd.do_no_harm import DoNoHarm
from fedekd.do_no_harm.evidence import CandidateResult
from fedekd.do_no_harm.rule import Comparison
from fedekd.errors import UserError
from fedekd.export.specification import deployed_tensors, specify
from fedekd.federation import BaselineOptions, ClientResult, MultiProcess, Orchestrator, RoundOptions, SequentialEngine
from fedekd.federation.checks import check_candidates
from fedekd.federation.local_baseline import train_local_baseline
from fedekd.federation.update_validation import invalid_field
from fedekd.functional.metric_tests import auroc_gain, macro_auroc_gains, pair_outcomes, plugin_betting_p_value
from fedekd.methods import ClientOptions, Ditto, FedAvg, FedeKD, Method, ProxyEnsemble
from fedekd.methods.serving import CANDIDATE, Candidate
from fedekd.models import MultiExitNetwork

from .conftest import Federate, Recorder
from .runs import repeatable

#: At this confidence every candidate with a gain passes.
BOTH = DoNoHarm(confidence=0.05, candidates=("tuned", "ensemble"))


@pytest.fixture
def choosing(federate: Federate, write_blobs: Callable[..., Path], tmp_path: Path) -> Federate:
    """Builds an orchestrator of ProxyEnsemble with two candidates; keyword arguments replace its parts."""
    npz = write_blobs(tmp_path / "more.npz", num_samples=240)

    def make(method: Method | None = None, **parts: Any) -> Orchestrator:
        # Hardly any training of the private model, so that the proxies gain.
        client = ClientOptions(
            local_epochs=1,
            private_model={"class_path": "fedekd.models.ProxyCNN"},
            proxy_model={"class_path": "fedekd.models.ProxyCNN"},
            optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        )
        data = FederatedDataModule(str(npz), num_clients=3, alpha=2, batch_size=8, fractions=(0.4, 0.4, 0.2))
        defaults: dict[str, Any] = {
            "data": data,
            "client": client,
            "do_no_harm": BOTH,
            "rounds": RoundOptions(rounds=1),
        }
        defaults["baseline"] = BaselineOptions(control=False)
        return federate(method or ProxyEnsemble(proxy_epochs=2, finetune_epochs=2), **{**defaults, **parts})

    return make


def counts(client: Any, role: str, splits: tuple[str, ...]) -> tuple[int, int]:
    """Count the samples that only the private, and only the other model classifies correctly."""
    right = {}
    for name in ("private", role):
        wrong = [client.held_out(split, name)[0].bool() for split in splits]
        right[name] = ~torch.cat(wrong)
    return int((right["private"] & ~right[role]).sum()), int((~right["private"] & right[role]).sum())


@pytest.mark.slow
def test_candidates_do_not_depend_on_the_engine(choosing: Federate, tmp_path: Path) -> None:
    summary = choosing().run()
    parallel = choosing(engine=MultiProcess(2), output=tmp_path)
    assert repeatable(parallel.run()) == repeatable(summary)
    names = [client.deployed_name for client in choosing(output=tmp_path).load_clients()]
    assert names == [client["deployed"] for client in summary["clients"]]


def test_candidates_are_deployed_stored_and_equal_after_resume(choosing: Federate, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = choosing(output=folder, baseline_dir=tmp_path / "local")
    summary = run.run()
    deployed = [client["deployed"] for client in summary["clients"]]
    assert set(deployed) & {"tuned", "ensemble"}
    clients = choosing(output=folder).load_clients()
    for client, values in zip(clients, summary["clients"], strict=True):
        assert client.deployed_name == values["deployed"]
        assert list(values["candidates"]) == ["tuned", "ensemble"]
        if client.deployed_name == "local":
            assert values["deployed_score"] == values["local"]
            continue
        # The private model is the local one.
        assert (values["worse"], values["better"]) == counts(client, CANDIDATE, ("holdout",))
        assert client.score(role=CANDIDATE) == values["deployed_score"]
        assert values["deployed_delta"] == pytest.approx(values["deployed_score"] - values["local"])
        assert client.deployed_model is not client.networks["private"]
        members = {"tuned": ("tuned",), "ensemble": ("private", "proxy", "tuned")}[client.deployed_name]
        assert client.deployed_serving is not None
        assert client.deployed_serving.members == members
    mean = sum(client["deployed_score"] for client in summary["clients"]) / 3
    assert summary["deployed"]["mean"] == pytest.approx(mean)

    # A run that was killed after round 0 continues to the same decisions.
    for name in ("summary.json", "checkpoints/manifest-0002.json"):
        (folder / name).unlink()
    again = choosing(output=folder, baseline_dir=tmp_path / "local")
    assert repeatable(again.run()) == repeatable(summary)
    assert repeatable(choosing(output=folder, baseline_dir=tmp_path / "local").evaluate_checkpoint()) == repeatable(
        summary
    )


def test_exit_as_candidate_is_deployed_stored_and_exported(choosing: Federate, tmp_path: Path) -> None:
    def run() -> Orchestrator:
        client = ClientOptions(local_epochs=1, private_model={"class_path": "fedekd.models.ProxyCNN"}, exits=2)
        rule = DoNoHarm(confidence=0.02, candidates=("exit_1", "private"))
        return choosing(FedAvg(), client=client, do_no_harm=rule, output=tmp_path / "run")

    summary = run().run()
    assert "exit_1" in {client["deployed"] for client in summary["clients"]}
    again = run()
    for client, values in zip(again.load_clients(), summary["clients"], strict=True):
        if values["deployed"] != "exit_1":
            continue
        network = client.deployed_model
        assert isinstance(network, MultiExitNetwork)
        assert network.num_exits == 1
        assert values["deployed_score"] == client.evaluate(role="private")[0][0]
        specification = specify(again.data, client, None)
        exported = specification.build(deployed_tensors(client, specification))
        images = torch.rand(5, *client.samples.input_shape)
        torch.testing.assert_close(exported(images)[-1], network(images)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("exits", [None, 2])
def test_exit_that_a_client_does_not_have_raises_one_line_error(choosing: Federate, exits: int | None) -> None:
    """Sites of a Flower federation may have other networks than the server."""
    client = ClientOptions(private_model={"class_path": "fedekd.models.ProxyCNN"}, exits=exits)
    run = choosing(FedAvg(), client=client, do_no_harm=None)
    assert isinstance(run.engine, SequentialEngine)
    client = run.engine.client(1)
    expected = rf"^do_no_harm.candidates: expected exits below {exits or 1} at client 1, got 2"
    with client.trial(Candidate("exit_2", None)), pytest.raises(UserError, match=expected):
        client.network(CANDIDATE)
    with pytest.raises(UserError, match=r"do_no_harm.candidates: expected names among private"):
        check_candidates(DoNoHarm(candidates=("exit_2",)), run.method, run.spec, [1])


def test_candidate_that_fails_ends_the_tests(choosing: Federate) -> None:
    # The private model of ProxyEnsemble is the local model: no sample differs.
    rule = DoNoHarm(confidence=0.9, candidates=("private", "tuned"))
    recorder = Recorder()
    summary = choosing(do_no_harm=rule, observer=recorder).run()
    for client in summary["clients"]:
        assert client["deployed"] == "local"
        assert client["candidates"]["private"]["p_value"] == 1
        assert client["candidates"]["tuned"] == "not tested"
        assert client["deployed_delta"] == 0
    [line] = [line for line in recorder.warnings if line.startswith("do_no_harm: no compared sample differs")]
    samples = summary["clients"][0]["samples"]
    assert f"client 0: more than {math.ceil(4 / (1 - 0.05 ** (1 / samples)))}" in line


@pytest.mark.parametrize("metric", ["recall", "balanced_accuracy"])
def test_metric_of_classes_warns_of_classes_with_too_few_samples(choosing: Federate, metric: Any) -> None:
    recorder = Recorder()
    choosing(do_no_harm=DoNoHarm(confidence=0.999, metric=metric), observer=recorder)
    [line] = [line for line in recorder.warnings if "samples of each class" in line]
    assert "These clients have fewer and deploy their local model: client 0 (" in line


def test_auroc_compares_pairs_of_the_stored_scores(
    choosing: Federate, write_blobs: Callable[..., Path], tmp_path: Path
) -> None:
    npz = write_blobs(tmp_path / "two.npz", num_samples=150, num_classes=2)
    data = FederatedDataModule(str(npz), num_clients=2, alpha=5, batch_size=8, fractions=(0.4, 0.4, 0.2))
    rule = DoNoHarm(confidence=0.3, metric="auroc", margin=0.1, candidates=("proxy",))
    run = choosing(FedeKD(), data=data, do_no_harm=rule)
    summary, engine = run.run(), run.engine
    assert isinstance(engine, SequentialEngine)
    for client, values in zip(engine.clients.values(), summary["clients"], strict=True):
        # The same local model, trained again.
        local = engine._new_client(client.number)
        train_local_baseline(local, 1, None)
        splits = ("tuning", "holdout")
        targets = torch.cat([client.targets(split) for split in splits])
        old, new = (
            torch.cat([each.held_out(split, role)[1] for split in splits])
            for each, role in ((local, "private"), (client, "proxy"))
        )
        worse, better, pairs = pair_outcomes(old, new, targets)
        assert (values["worse"], values["better"], values["samples"]) == (worse, better, pairs)
        assert pairs == min(int((targets == label).sum()) for label in (0, 1))
        assert values["gain"] == pytest.approx(auroc_gain(old, new, targets))
        assert (values["deployed"] == "proxy") == (values["p_value"] <= values["level"])


@pytest.mark.parametrize("looks", [1, 2])
def test_auroc_of_three_classes_compares_log_probabilities(choosing: Federate, looks: int) -> None:
    rule = DoNoHarm(confidence=0.3, metric="auroc", margin=0.3, candidates=("proxy",), looks=looks)
    run = choosing(FedeKD(), do_no_harm=rule, rounds=RoundOptions(rounds=2))
    summary, engine = run.run(), run.engine
    assert isinstance(engine, SequentialEngine)
    for client, values in zip(engine.clients.values(), summary["clients"], strict=True):
        local, splits = engine._new_client(client.number), ("tuning", "holdout")
        train_local_baseline(local, 2, None)
        targets = torch.cat([client.targets(split) for split in splits])
        classes = sorted({*targets.tolist(), *client.targets("train").tolist()})
        old, new = (
            torch.cat([each.predict(role, split, mixed=False).output.double().log_softmax(1) for split in splits])
            for each, role in ((local, "private"), (client, "proxy"))
        )
        gains = macro_auroc_gains(old, new, targets, classes)
        assert values["samples"] == len(gains) == min(int((targets == label).sum()) for label in classes)
        assert (values["worse"], values["better"]) == ((gains < 0).sum(), (gains > 0).sum())
        assert values["gain"] == pytest.approx(auroc_gain(old, new, targets, classes))
        assert values["p_value"] == pytest.approx(plugin_betting_p_value(gains, rule.margin, rule.level))


@pytest.mark.parametrize(
    ("method", "rule", "parts", "words"),
    [
        (FedAvg, {"candidates": ("proxy",)}, {}, "expected names among private for method FedAvg, got 'proxy'"),
        (
            FedAvg,
            {"candidates": ("exit_2",)},
            {"client": ClientOptions(private_model={"class_path": "fedekd.models.ProxyCNN"}, exits=2)},
            "expected names among private, exit_1 for method FedAvg, got 'exit_2'",
        ),
        (FedeKD, {"candidates": ("tuned",)}, {}, "expected names among private, proxy for method FedeKD, got 'tuned'"),
        (ProxyEnsemble, {"candidates": ("local",)}, {}, "expected names among private, proxy, tuned, ensemble for"),
        (Ditto, {"candidates": ("global", "x")}, {}, "expected names among private, global for method Ditto, got 'x'"),
        (
            ProxyEnsemble,
            {"candidates": ("ensemble", "tuned"), "looks": 2},
            {"rounds": RoundOptions(rounds=2)},
            "do_no_harm.candidates: expected models that exist at each of several do_no_harm.looks, got 'tuned'",
        ),
        (
            FedeKD,
            {"candidates": ("proxy",)},
            {"rounds": RoundOptions(rounds=1, select_round="best")},
            "do_no_harm.candidates: expected none with --select_round best",
        ),
    ],
)
def test_orchestrator_invalid_candidates_or_metric_raise_one_line_error(
    choosing: Federate, method: Any, rule: Any, parts: Any, words: str
) -> None:
    with pytest.raises(UserError) as error:
        choosing(method(), do_no_harm=DoNoHarm(**rule), **parts)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_result_with_candidates_is_checked_after_json() -> None:
    comparison = Comparison("tuned", 30, 1, 9, 0.3, 0.01, 0.1, (CandidateResult("tuned", True, 30, 1, 9, 0.3, 0.01),))
    stored = json.loads(json.dumps(asdict(comparison)))
    assert Comparison(**stored) == comparison

    def reason(**changes: Any) -> str | None:
        values = Comparison(**{**stored, **changes})
        return invalid_field(ClientResult(0, 0.5, 1, {}, None, comparison=values))

    row = stored["candidates"][0]
    assert reason() is None
    for changes in (
        {"deployed": "another"},
        {"candidates": [{**row, "worse": -1}]},
        {"candidates": [{**row, "samples": 5}]},
        {"candidates": [{**row, "p_value": "low"}]},
        {"deciding": 0.5},
    ):
        assert str(reason(**changes)).startswith("comparison: expected consistent counts"), changes
    with pytest.raises(TypeError):
        reason(candidates=[{"unknown": 1}])
