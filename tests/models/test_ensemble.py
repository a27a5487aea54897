"""Ensembles against a literal float64 transcription, with and without exits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.early_exit.inference import early_exit_forward, exit_index
from fedekd.errors import UserError
from fedekd.functional import combine_log_linear
from fedekd.models import (
    Ensemble,
    MultiExitEnsemble,
    MultiExitNetwork,
    PrivateCNN,
    ProxyCNN,
    build_ensemble,
    exit_costs,
    multi_exit,
    network_flops,
)
from fedekd.tasks import Task

SHAPE = (2, 9, 8)


def literal(outputs: list[Tensor], weights: Tensor, offsets: Tensor, task: Task) -> np.ndarray:
    """sum_m w_m log softmax(z_m + o_m), or sum_m w_m (z_m + o_m), in loops over samples and classes."""
    outputs = [output.detach() for output in outputs]
    count, classes = outputs[0].shape
    result = np.zeros((count, classes))
    for member, output in enumerate(outputs):
        for i in range(count):
            z = [float(output[i, c]) + float(offsets[member, c]) for c in range(classes)]
            total = sum(math.exp(value) for value in z)
            for c in range(classes):
                value = math.log(math.exp(z[c]) / total) if task == "classification" else z[c]
                result[i, c] += float(weights[member]) * value
    return result


def members(exits: int | None = None, classes: int = 3) -> dict[str, nn.Module]:
    private: nn.Module = PrivateCNN(SHAPE[0], SHAPE[1:], classes, width=0.1)
    if exits is not None:
        private = multi_exit(private, classes, exits)
    proxies = {name: ProxyCNN(SHAPE[0], SHAPE[1:], classes) for name in ("proxy", "tuned")}
    return {"private": private, **proxies}


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("exits", [None, 2])
def test_ensemble_equals_literal_transcription(task: Task, exits: int | None) -> None:
    torch.manual_seed(0)
    classes = 1 if task == "regression" else 3
    networks = {name: network.double().eval() for name, network in members(exits, classes).items()}
    weights, offsets = torch.tensor([0.2, 0.7, 0.4]).double(), torch.randn(3, classes).double()
    x = torch.randn(5, *SHAPE).double()
    ensemble = build_ensemble(networks, weights, offsets, task).eval()
    outputs = ensemble(x) if exits else [ensemble(x)]
    privates = networks["private"](x) if exits else [networks["private"](x)]
    assert len(outputs) == len(privates)
    for output, private in zip(outputs, privates, strict=True):
        parts = [private, networks["proxy"](x), networks["tuned"](x)]
        np.testing.assert_allclose(output.detach(), literal(parts, weights, offsets, task), rtol=1e-12, atol=1e-12)


def test_ensemble_of_one_member_has_its_probabilities() -> None:
    torch.manual_seed(1)
    network = members()["private"].eval()
    ensemble = build_ensemble({"private": network}, torch.ones(1), torch.zeros(1, 3), "classification")
    x = torch.randn(4, *SHAPE)
    torch.testing.assert_close(ensemble(x).softmax(1), network(x).softmax(1))


def test_ensemble_with_exits_supports_early_exit_inference() -> None:
    torch.manual_seed(2)
    ensemble = build_ensemble(members(3), torch.full((3,), 1 / 3), torch.zeros(3, 3), "classification").eval()
    assert isinstance(ensemble, MultiExitNetwork)
    assert ensemble.num_exits == 3
    x = torch.randn(64, *SHAPE)
    outputs = [output.detach() for output in ensemble(x)]
    scores = torch.stack([output.softmax(1).amax(1) for output in outputs], dim=1).double()
    thresholds = [float(scores[:, 0].median()), float(scores[:, 1].median()), -math.inf]
    result = early_exit_forward(ensemble, x, thresholds)
    expected = exit_index(scores.numpy(), thresholds, thresholds)
    assert set(expected) == {0, 1, 2}
    assert result.exits.tolist() == expected.tolist()
    for row, exit_ in enumerate(expected):
        torch.testing.assert_close(result.logits[row], outputs[exit_][row])


def test_ensemble_flops_are_the_sum_of_its_members() -> None:
    networks = members(2)
    ensemble = build_ensemble(networks, torch.ones(3), torch.zeros(3, 3), "classification")
    assert isinstance(ensemble, MultiExitEnsemble)
    assert network_flops(ensemble, SHAPE) == sum(network_flops(network, SHAPE) for network in networks.values())
    proxies = sum(network_flops(networks[name], SHAPE) for name in ("proxy", "tuned"))
    alone = exit_costs(networks["private"], SHAPE)  # type: ignore[arg-type]
    costs = exit_costs(ensemble, SHAPE)
    assert costs.stages == (alone.stages[0] + proxies, *alone.stages[1:])
    assert costs.heads == alone.heads


@pytest.mark.parametrize("exits", [None, 2])
def test_ensemble_fingerprint_depends_on_members_weights_and_offsets(exits: int | None) -> None:
    torch.manual_seed(3)
    networks, equal, zero = members(exits), torch.full((3,), 1 / 3), torch.zeros(3, 3)

    def fingerprint(weights: Tensor, offsets: Tensor) -> str:
        return network_fingerprint(build_ensemble(networks, weights, offsets, "classification"))

    expected = fingerprint(equal, zero)
    assert fingerprint(equal, zero) == expected
    for row in range(3):
        assert fingerprint(equal.index_fill(0, torch.tensor([row]), 0.5), zero) != expected
        assert fingerprint(equal, zero.index_fill(0, torch.tensor([row]), 0.5)) != expected
    for name in networks:
        with torch.no_grad():
            next(networks[name].parameters()).flatten()[0].add_(1.0)
        assert fingerprint(equal, zero) != expected


@pytest.mark.parametrize("exits", [None, 2])
def test_ensemble_moves_with_all_its_tensors(exits: int | None) -> None:
    ensemble = build_ensemble(members(exits), torch.full((3,), 1 / 3), torch.zeros(3, 3), "classification")
    ensemble.to("meta")
    outputs = ensemble(torch.zeros(2, *SHAPE, device="meta"))
    assert all(output.device.type == "meta" for output in (outputs if exits else [outputs]))


def test_ensemble_bounds_log_probabilities_as_the_fit_does() -> None:
    outputs = torch.tensor([[0.0, 500.0]])
    ensemble = Ensemble({"a": nn.Identity(), "b": nn.Identity()}, torch.ones(2), torch.zeros(2, 2), "classification")
    members_ = torch.stack([outputs, outputs]).log_softmax(2)
    expected = combine_log_linear(members_, torch.ones(2))
    torch.testing.assert_close(ensemble(outputs).log_softmax(1), expected)
    assert float(ensemble(outputs)[0, 0]) == -200.0


def test_ensemble_wrong_shapes_raise() -> None:
    networks = {"a": nn.Flatten()}
    with pytest.raises(UserError, match=r"weights: expected shape \(1,\), got \(2,\)"):
        Ensemble(networks, torch.ones(2), torch.zeros(1, 3), "classification")
    with pytest.raises(UserError, match=r"offsets: expected shape \(1, C\), got \(2, 3\)"):
        Ensemble(networks, torch.ones(1), torch.zeros(2, 3), "classification")
