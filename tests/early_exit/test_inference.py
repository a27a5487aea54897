"""Early-exit forward pass against the whole network and a literal transcription of the policy."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock

from fedekd.early_exit import early_exit_forward, exit_index
from fedekd.errors import UserError
from fedekd.functional import CONFIDENCES
from fedekd.models import MultiExitNetwork, PrivateCNN, multi_exit

CLASSES, INF = 5, math.inf
#: Matrix products of other batch sizes differ in their last bits; measured: at most 4e-7 at logits of up to 3.
ROUND_OFF = 2e-6


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 1), CNBlockConfig(32, None, 1)]
    return models.ConvNeXt(blocks, num_classes=CLASSES)


def swin() -> nn.Module:
    return models.SwinTransformer([2, 2], 8, [1, 1, 2, 1], [1, 2, 2, 2], [2, 2], num_classes=CLASSES)


def vit() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return models.VisionTransformer(**sizes, num_classes=CLASSES)


# By name: how it is built, channels and size of its images.
NETWORKS = {
    "PrivateCNN": (lambda: PrivateCNN(1, 8, CLASSES), 1, 8),
    "ResNet": (lambda: models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), 3, 8),
    "ConvNeXt": (convnext, 3, 32),
    "Swin": (swin, 3, 32),
    "ViT": (vit, 3, 8),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


@cache
def network_of(name: str) -> MultiExitNetwork:
    """Build a network whose weights and running statistics all differ from their defaults."""
    torch.manual_seed(0)
    network = multi_exit(NETWORKS[name][0](), CLASSES, cifar_stem=True)
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.8 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2)
    return network.to(memory_format=torch.channels_last)


@cache
def reference_outputs(name: str, batch: int, score: str = "max_softmax"):
    """Images, the logits (B, E, C) of all exits, and their scores (B, E)."""
    _, channels, size = NETWORKS[name]
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))
    x = x.contiguous(memory_format=torch.channels_last)
    network = network_of(name).eval()
    with torch.no_grad():
        logits = torch.stack(network(x), dim=1)
    scores = torch.stack([CONFIDENCES[score](each) for each in logits.unbind(1)], dim=1)
    return x, logits, scores.double().numpy()


def literal_exit(scores, thresholds, search_bounds) -> int:
    """Assign one sample to an exit by the rules of the policy."""
    last = len(scores) - 1
    for exit_ in range(last):
        if thresholds[exit_] == search_bounds[exit_] == INF:
            continue  # closed: the head is not evaluated
        if scores[exit_] >= thresholds[exit_]:
            return exit_
        if not scores[exit_] < search_bounds[exit_]:
            return last
    return last


def require_equal(output, logits, scores, thresholds, search_bounds) -> None:
    expected = [literal_exit(row, thresholds, search_bounds) for row in scores]
    assert exit_index(scores, thresholds, search_bounds).tolist() == expected
    bounds = np.stack([thresholds[:-1], search_bounds[:-1]])[:, None]
    near = (np.abs(scores[:, :-1] - bounds) < 1e-6).any(axis=(0, 2))
    found = output.exits.numpy()
    assert output.exits.dtype == torch.int64
    assert (found == expected)[~near].all()
    places = torch.arange(len(scores))
    assert output.logits.shape == (len(scores), CLASSES)
    assert (output.logits - logits[places, output.exits]).abs().max() <= ROUND_OFF
    np.testing.assert_allclose(output.scores.numpy(), scores[places.numpy(), found], rtol=0, atol=ROUND_OFF)


@st.composite
def policies(draw, scores):
    """Draw thresholds and search bounds, some of them equal to a score."""
    thresholds, search_bounds = [], []
    for exit_ in range(scores.shape[1] - 1):
        anywhere = st.one_of(
            st.floats(0.15, 1.05), st.sampled_from(scores[:, exit_].tolist()), st.sampled_from([INF, -INF])
        )
        thresholds.append(draw(anywhere))
        search_bounds.append(min(thresholds[-1], draw(st.one_of(st.just(INF), anywhere))))
    return [*thresholds, -INF], [*search_bounds, -INF]


@pytest.mark.parametrize("name", ["PrivateCNN", "Swin", "ViT"])
@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_forward_equals_literal_exits_for_random_policies(name, data):
    score = data.draw(st.sampled_from(sorted(CONFIDENCES)))
    x, logits, scores = reference_outputs(name, data.draw(st.sampled_from([1, 2, 3, 17, 33])), score)
    thresholds, search_bounds = data.draw(policies(scores))
    require_equal(
        early_exit_forward(network_of(name), x, thresholds, search_bounds, score),
        logits,
        scores,
        thresholds,
        search_bounds,
    )


@every_network
@pytest.mark.parametrize("batch", [1, 2, 31, 256])
def test_forward_equals_literal_exits_per_family_and_batch_size(name, batch):
    x, logits, scores = reference_outputs(name, batch)
    middle = [float(np.quantile(scores[:, exit_], 0.6)) + 3e-6 for exit_ in range(scores.shape[1] - 1)]
    for search_bound in (0.0, 0.04):
        thresholds, search_bounds = [*middle, -INF], [*(value - search_bound for value in middle), -INF]
        output = early_exit_forward(network_of(name), x, thresholds, search_bounds)
        require_equal(output, logits, scores, thresholds, search_bounds)
    if batch == 256:
        assert len(output.exits.unique()) == scores.shape[1]  # every exit was taken


@every_network
def test_forward_whole_batch_at_one_exit_is_bit_equal(name):
    x, logits, scores = reference_outputs(name, 31)
    for exit_ in range(scores.shape[1]):
        thresholds = [*[INF] * exit_, *[-INF] * (scores.shape[1] - exit_)]
        output = early_exit_forward(network_of(name), x, thresholds)
        assert torch.equal(output.logits, logits[:, exit_])
        assert output.scores.tolist() == scores[:, exit_].tolist()
        assert output.exits.tolist() == [exit_] * 31


def test_forward_score_equal_to_threshold_exits():
    """At the first exit, where the batch is whole and scores are equal to the last bit."""
    x, _, scores = reference_outputs("PrivateCNN", 31)
    network = network_of("PrivateCNN")
    for score in scores[:, 0].tolist():
        reached = early_exit_forward(network, x, [score, -INF, -INF]).exits == 0
        assert reached.tolist() == (scores[:, 0] >= score).tolist()
        # Less than the next float32 above: thresholds are compared as doubles.
        missed = early_exit_forward(network, x, [math.nextafter(score, INF), -INF, -INF]).exits == 0
        assert missed.tolist() == (scores[:, 0] > score).tolist()
        above_bound = early_exit_forward(network, x, [INF, -INF, -INF], [score, -INF, -INF]).exits == 2
        assert above_bound.tolist() == (scores[:, 0] >= score).tolist()


@given(data=st.data())
@settings(max_examples=200)
@example(data=None)
def test_exit_index_equals_literal_transcription(data):
    if data is None:
        scores = np.array([[0.5, 0.5, 0.1], [math.nan, 0.9, 0.9], [0.4, 0.5, 0.9], [0.3, 0.5, 0.9]])
        thresholds, search_bounds = [0.5, 0.5, -INF], [0.4, 0.5, -INF]
        assert exit_index(scores, thresholds, search_bounds).tolist() == [0, 2, 2, 1]
        return
    exits = data.draw(st.integers(1, 4))
    values = st.sampled_from([0.1, 0.2, 0.3, math.nan])
    rows = data.draw(st.lists(st.lists(values, min_size=exits, max_size=exits), min_size=1, max_size=6))
    scores = np.array(rows)
    thresholds = [*(data.draw(st.sampled_from([-INF, 0.1, 0.2, 0.3, INF])) for _ in range(exits - 1)), -INF]
    search_bounds = [min(t, data.draw(st.sampled_from([-INF, 0.1, 0.2, 0.3, INF]))) for t in thresholds]
    assert exit_index(scores, thresholds, search_bounds).tolist() == [
        literal_exit(r, thresholds, search_bounds) for r in scores
    ]


class Counting(nn.Module):
    """Record the number of rows per call."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.rows = part, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.part(x)


class CountingLinear(nn.Linear):
    rows: list[int]

    def forward(self, x):
        self.rows.append(len(x))
        return super().forward(x)


def counting() -> MultiExitNetwork:
    torch.manual_seed(1)
    last = CountingLinear(6, 3)
    last.rows = []
    stages = [nn.Sequential(nn.Flatten(), nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()]
    return MultiExitNetwork(map(Counting, stages), [*(Counting(nn.Linear(6, 3)) for _ in range(3)), last]).eval()


def rows_of(network: MultiExitNetwork):
    return [stage.rows for stage in network.stages], [head.rows for head in network.heads]


def test_forward_computes_only_remaining_rows_and_open_heads():
    network, x = counting(), 3 * torch.randn(64, 1, 2, 2)
    with torch.no_grad():
        scores = torch.stack([CONFIDENCES["max_softmax"](each) for each in network(x)], dim=1).double().numpy()
    thresholds = [float(np.quantile(scores[:, 0], 0.7)), INF, float(np.quantile(scores[:, 2], 0.5)), -INF]
    search_bounds = [float(np.quantile(scores[:, 0], 0.5)), INF, thresholds[2], -INF]
    exits = exit_index(scores, thresholds, search_bounds)
    skipped = (scores[:, 0] >= search_bounds[0]) & (exits != 0)
    assert skipped.any()
    network = counting()
    early_exit_forward(network, x, thresholds, search_bounds)
    stayed, deep = int((exits != 0).sum()), int((exits == 3).sum())
    assert rows_of(network) == (
        [[64], [stayed], [stayed], [deep]],
        [[64], [], [stayed - int(skipped.sum())], [deep]],
    )


def test_forward_all_exited_skips_deeper_stages():
    network = counting()
    early_exit_forward(network, torch.randn(5, 1, 2, 2), [INF, -INF, 0.5, -INF])
    assert rows_of(network) == ([[5], [5], [], []], [[], [5], [], []])


def test_forward_ineligible_samples_skip_heads():
    network = counting()
    early_exit_forward(network, torch.randn(5, 1, 2, 2), [2.0, 0.0, 0.0, -INF], [0.0, 0.0, 0.0, -INF])
    assert rows_of(network) == ([[5]] * 4, [[5], [], [], [5]])


def test_forward_head_without_effect_is_skipped():
    network = counting()
    early_exit_forward(network, torch.randn(5, 1, 2, 2), [0.99, INF, INF, -INF], [0.99, INF, 0.4, -INF])
    assert rows_of(network)[1] == [[5], [], [], [5]]


def test_forward_nan_scores_take_last_exit():
    x, *_ = reference_outputs("PrivateCNN", 17)
    x = x.clone()
    x[[2, 11]] = math.nan
    for thresholds in ([-INF, -INF, -INF], [0.0, 0.0, 0.0], [0.3, INF, -INF]):
        output = early_exit_forward(network_of("PrivateCNN"), x, thresholds)
        assert output.exits[[2, 11]].tolist() == [2, 2]
        assert output.scores[[2, 11]].isnan().all()
        others = [place for place in range(17) if place not in (2, 11)]
        assert output.logits[others].isfinite().all()
        assert thresholds[0] > 0 or not output.exits[others].any()


def test_forward_restores_mode_and_weights():
    network = multi_exit(models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), CLASSES).train()
    network.stages[0][1].eval()  # a frozen BatchNorm
    modes = [part.training for part in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert any(name.endswith("num_batches_tracked") for name in before)
    output = early_exit_forward(network, torch.randn(9, 3, 8, 8), [0.3, 0.3, 0.3, -INF])
    with pytest.raises(RuntimeError):
        early_exit_forward(network, torch.randn(9, 7, 8, 8), [0.3, 0.3, 0.3, -INF])
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not output.logits.requires_grad


def test_forward_single_exit_and_empty_batch():
    network = MultiExitNetwork([nn.Flatten()], [nn.Linear(4, 3)])
    assert early_exit_forward(network, torch.zeros(2, 1, 2, 2), [0.9]).exits.tolist() == [0, 0]
    empty = early_exit_forward(counting(), torch.zeros(0, 1, 2, 2), [0.5, 0.5, 0.5, -INF])
    assert (tuple(empty.logits.shape), len(empty.exits), len(empty.scores)) == ((0, 3), 0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"thresholds": [0.5, -INF]}, "expected 4 of each, one per exit of the network, got 2 and 2"),
        ({"search_bounds": [0.5] * 3}, "got 4 and 3"),
        ({"score": "max_softmx"}, "Did you mean 'max_softmax'"),
    ],
)
def test_forward_invalid_arguments_raise_one_line_error(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        early_exit_forward(counting(), torch.zeros(1, 1, 2, 2), **{"thresholds": [0.5, 0.5, 0.5, -INF], **arguments})
    assert "\n" not in str(error.value)
