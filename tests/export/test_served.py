"""Served networks equal the framework: exits of policies, preprocessing of tables, margins of thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from policies import by_class, calibrated, framework, images

from fedekd.data.columns import Column
from fedekd.data.tables import fit_transformer, transform
from fedekd.early_exit import ExitPolicy
from fedekd.errors import UserError
from fedekd.export.comparison import (
    HeldOut,
    compare,
    module_outputs,
    round_off_margins,
)
from fedekd.export.inputs import PixelScaling, TablePreprocessing
from fedekd.export.served import OUTPUTS, ServedNetwork
from fedekd.functional import SCORES


@pytest.mark.parametrize("score", SCORES)
def test_served_network_random_images_equals_policy(score: str) -> None:
    network, proxy, policy = calibrated(score)
    served = ServedNetwork(network, PixelScaling(torch.float32), "classification", policy, proxy)
    expected = framework(network, proxy, policy, images())
    assert np.bincount(expected["exit"], minlength=4)[1:].min() >= 20
    with torch.no_grad():
        outputs = dict(zip(OUTPUTS["classification"], served(images()), strict=True))
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name].numpy(), values, rtol=0, atol=2e-6, err_msg=name)
        assert outputs[name].numpy().dtype == values.dtype


def test_round_off_margin_separates_a_threshold_from_the_next_lower_score() -> None:
    network, _, policy = calibrated("max_softmax")
    served = ServedNetwork(network, PixelScaling(torch.float32), "classification", policy)
    with torch.no_grad():
        scores = served.score(network(PixelScaling(torch.float32)(images()))[0], None).sort().values
    close = int((scores[1:] - scores[:-1])[:300].clamp_min(4e-7).argmin())
    limit = float(scores[close + 1])
    tied = ExitPolicy((limit, math.inf, -math.inf), (limit, math.inf, -math.inf), (True, False, False), 0.1, 0.9, "ltt")
    [first, closed] = round_off_margins(
        ServedNetwork(network, PixelScaling(torch.float32), "classification", tied), images()
    )
    assert closed == 1e-6  # of a closed exit: no effect
    assert 0 < first <= 1e-6
    below = scores[scores < limit - 3e-7].max()
    assert below < limit - first < limit


def test_compare_other_exit_raises_unless_its_score_is_on_a_threshold() -> None:
    outputs = {
        "label": np.array([0, 1]),
        "probabilities": np.array([[0.9, 0.1], [0.2, 0.8]], np.float32),
        "score": np.array([0.9, 0.8]),
        "exit": np.array([1, 2]),
        "logits": np.zeros((2, 2), np.float32),
    }
    raw = torch.zeros(2, 1)
    exits = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.9, 0.1], [0.2, 0.8]]], np.float32)
    other = {**outputs, "exit": np.array([2, 2]), "label": np.array([1, 1]), "probabilities": exits[:, 1]}

    def held_out(near: np.ndarray) -> HeldOut:
        return HeldOut(raw, outputs, exits, near)

    assert compare("f", outputs, held_out(np.zeros((2, 1), bool))).exits == 0
    assert compare("f", other, held_out(np.array([[True], [False]]))).exits == 1
    with pytest.raises(UserError, match="f: expected the exits of the framework, got another one for 1 of 2"):
        compare("f", other, held_out(np.array([[False], [True]])))
    wrong = {**outputs, "probabilities": outputs["probabilities"] + np.float32(1e-3)}
    with pytest.raises(UserError, match=r"up to 0\.0001, got a difference of 0\.001"):
        compare("f", wrong, held_out(np.ones((2, 1), bool)))
    behind = np.array([[False, True], [False, False]])  # the exit is that of another threshold
    with pytest.raises(UserError, match="got another one for 1 of 2"):
        compare("f", other, held_out(behind))
    score = {**outputs, "score": outputs["score"] + 1e-3}
    with pytest.raises(UserError, match=r"got a difference of 0\.001"):
        compare("f", score, held_out(np.ones((2, 1), bool)))
    with pytest.raises(UserError, match=r"got a difference of 0\.7"):  # probabilities of exit 1 at exit 2
        compare("f", {**outputs, "exit": other["exit"]}, held_out(np.ones((2, 1), bool)))
    broken = {**other, "probabilities": np.array([[np.nan, 0.1], [0.2, 0.8]])}  # on a threshold
    with pytest.raises(UserError, match="expected finite probabilities, got NaN or infinity for 1 of 2"):
        compare("f", broken, held_out(np.ones((2, 1), bool)))


def test_table_preprocessing_equals_scikit_learn() -> None:
    columns = (
        Column("age", "numeric"),
        Column("sex", "categorical", ("f", "m")),
        Column("constant", "numeric"),
        Column("empty", "categorical", ("x",)),
        Column("site", "categorical", ("a", "b", "c")),
    )
    rng = np.random.default_rng(0)

    def table(count: int) -> np.ndarray:
        empty, sites = np.full(count, np.nan), rng.integers(0, 3, count)
        parts = (rng.normal(50, 9, count), rng.integers(0, 2, count), np.full(count, 3.7), empty, sites)
        values = np.stack(parts, axis=1).astype(float)
        values[rng.random(values.shape) < 0.1] = np.nan
        return values

    transformer = fit_transformer(columns, table(200))
    rows = table(100)
    rows[0, 4] = 7  # an unknown category
    expected = transform(transformer, rows)
    module = TablePreprocessing.from_transformer(columns, transformer, torch.float32)
    assert torch.equal(module(torch.from_numpy(rows)), expected)
    again = module(module.rows_of(expected))
    torch.testing.assert_close(again[1:], expected[1:], rtol=0, atol=1e-6)  # row 0 has no category to go back to


def test_thresholds_per_predicted_class_equal_the_framework() -> None:
    network, proxy, policy = calibrated("max_softmax")
    policy = by_class(policy)
    served = ServedNetwork(network, PixelScaling(torch.float32), "classification", policy)
    raw = images(200)
    expected = framework(network, proxy, policy, raw)
    assert len(set(expected["exit"].tolist())) == 3
    with torch.no_grad():
        logits = network(served.preprocessing(raw))
    scores = np.stack([each.softmax(1).amax(1).double().numpy() for each in logits], axis=1)
    predicted = np.stack([each.argmax(1).numpy() for each in logits], axis=1)
    assert (policy.assign(scores, predicted) + 1).tolist() == expected["exit"].tolist()
    assert not (predicted[expected["exit"] == 1, 0] == 0).any()  # closed for class 0
    assert module_outputs(served, "classification", raw)["exit"].tolist() == expected["exit"].tolist()
    assert len(round_off_margins(served, raw)) == 2
