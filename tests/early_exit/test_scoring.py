from __future__ import annotations

import math

import pytest
import torch

from fedekd.early_exit.scoring import ExitOutputs, exit_outputs, network_input
from fedekd.errors import UserError
from fedekd.functional import CONFIDENCES
from fedekd.models import PrivateCNN, multi_exit


def network(exits: int = 3):
    torch.manual_seed(0)
    return multi_exit(PrivateCNN(3, 8, 4), 4, exits)


def images(n: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, 4, (n,), generator=generator)


def test_exit_outputs_equal_network_in_eval_mode():
    model, (pixels, labels) = network().train(), images()
    model.stages[0].append(torch.nn.Dropout(0.9))
    outputs = exit_outputs(model, pixels, labels, batch_size=8)
    assert model.training
    assert (len(outputs), outputs.num_exits, tuple(outputs.logits.shape)) == (21, 3, (21, 3, 4))
    assert not outputs.logits.requires_grad
    with torch.no_grad():
        expected = torch.stack(model.eval()(network_input(model, pixels)), dim=1)
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(outputs.labels, labels)
    one = exit_outputs(model, pixels, labels, batch_size=1)
    torch.testing.assert_close(one.logits, outputs.logits, rtol=0, atol=1e-6)


def test_network_input_scales_pixels_to_training_range():
    pixels, _ = images()
    x = network_input(network().double(), pixels)
    assert x.dtype == torch.float64
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert float(x.min()) >= -1
    assert float(x.max()) <= 1
    ends = network_input(network(), torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 8, 2).contiguous())
    assert ends.unique().numel() == 2


def test_exit_outputs_correct_and_accuracies():
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 3.0]]])
    outputs = ExitOutputs(logits, torch.tensor([0, 0, 1]))
    assert outputs.correct.tolist() == [[True, False], [True, True], [True, True]]
    assert outputs.accuracies == pytest.approx([1.0, 2 / 3])
    some = outputs.take(torch.tensor([2, 0, 2]))
    assert some.correct.tolist() == [[True, True], [True, False], [True, True]]
    assert outputs.take(torch.tensor([True, False, False])).correct.tolist() == [[True, False]]


@pytest.mark.parametrize("score", sorted(CONFIDENCES))
def test_to_scores_equals_named_confidence_per_exit(score):
    outputs = exit_outputs(network(), *images())
    scored = outputs.to_scores(score)
    for exit_ in range(3):
        expected = CONFIDENCES[score](outputs.logits[:, exit_])
        assert scored.scores[:, exit_].tolist() == expected.double().tolist()
    p = outputs.logits.double().softmax(2)
    for sample in range(len(outputs)):
        for exit_ in range(3):
            true_class = float(p[sample, exit_, outputs.labels[sample]])
            assert scored.true_class_probability[sample, exit_] == pytest.approx(true_class, abs=1e-6)
    assert scored.correct.tolist() == outputs.correct.tolist()


def test_to_scores_nan_or_unknown_score_raises():
    model = network()
    model.heads[1].linear.bias.data[0] = math.nan
    with pytest.raises(UserError, match="expected finite values, got NaN, first at sample 0, exit 2"):
        exit_outputs(model, *images()).to_scores()
    with pytest.raises(UserError, match=r"got 'margn'. Did you mean 'margin'"):
        exit_outputs(network(), *images()).to_scores("margn")


def test_exit_outputs_accepts_bfloat16_network():
    outputs = exit_outputs(network().to(torch.bfloat16), *images())
    assert outputs.logits.dtype == torch.float32
    assert len(outputs.to_scores()) == 21
