from __future__ import annotations

import math

import pytest
import torch

from fedekd.early_exit.scoring import ExitOutputs, exit_outputs, prepared
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


def test_outputs_are_the_whole_network_s_in_evaluation_mode():
    served, (pixels, labels) = network().train(), images()
    served.stages[0].append(torch.nn.Dropout(0.9))
    found = exit_outputs(served, pixels, labels, batch_size=8)
    assert served.training
    assert (len(found), found.num_exits, tuple(found.logits.shape)) == (21, 3, (21, 3, 4))
    assert not found.logits.requires_grad
    with torch.no_grad():
        expected = torch.stack(served.eval()(prepared(served, pixels)), dim=1)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(found.labels, labels)
    one = exit_outputs(served, pixels, labels, batch_size=1)
    torch.testing.assert_close(one.logits, found.logits, rtol=0, atol=1e-6)


def test_images_are_given_as_the_network_was_trained_on_them():
    pixels, _ = images()
    x = prepared(network().double(), pixels)
    assert x.dtype == torch.float64
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert float(x.min()) >= -1
    assert float(x.max()) <= 1
    ends = prepared(network(), torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 8, 2).contiguous())
    assert ends.unique().numel() == 2


def test_who_is_right_and_how_often():
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 3.0]]])
    found = ExitOutputs(logits, torch.tensor([0, 0, 1]))
    assert found.correct.tolist() == [[True, False], [True, True], [True, True]]
    assert found.accuracies == pytest.approx([1.0, 2 / 3])
    some = found.take(torch.tensor([2, 0, 2]))
    assert some.correct.tolist() == [[True, True], [True, False], [True, True]]
    assert found.take(torch.tensor([True, False, False])).correct.tolist() == [[True, False]]


@pytest.mark.parametrize("score", sorted(CONFIDENCES))
def test_scores_are_the_named_confidence_exit_by_exit(score):
    found = exit_outputs(network(), *images())
    scored = found.scored(score)
    for exit_ in range(3):
        expected = CONFIDENCES[score](found.logits[:, exit_])
        assert scored.scores[:, exit_].tolist() == expected.double().tolist()
    p = found.logits.double().softmax(2)
    for sample in range(len(found)):
        for exit_ in range(3):
            true_class = float(p[sample, exit_, found.labels[sample]])
            assert scored.true_class_probability[sample, exit_] == pytest.approx(true_class, abs=1e-6)
    assert scored.correct.tolist() == found.correct.tolist()


def test_a_diverged_network_and_an_unknown_score_are_told():
    served = network()
    served.heads[1].linear.bias.data[0] = math.nan
    with pytest.raises(UserError, match="hold NaN, first at sample 0, exit 2; the network diverged"):
        exit_outputs(served, *images()).scored()
    with pytest.raises(UserError, match="score is 'margn', which is not known; did you mean 'margin'"):
        exit_outputs(network(), *images()).scored("margn")


def test_a_network_in_bfloat16_can_be_scored():
    found = exit_outputs(network().to(torch.bfloat16), *images())
    assert found.logits.dtype == torch.float32
    assert len(found.scored()) == 21
