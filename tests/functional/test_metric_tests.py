"""Paired tests in balanced accuracy and AUROC: literal references, and exact error rates."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from fedekd.functional.metric_tests import (
    auroc_gain,
    balanced_gains,
    delong_p_value,
    macro_auroc_gains,
    pair_outcomes,
    plugin_betting_p_value,
)
from fedekd.metrics.classification import auroc


def literal_balanced(gains, labels, classes):
    """Blocks of nearly equal size, in order, as a loop."""
    of_class = [[g for g, label in zip(gains, labels, strict=True) if label == c] for c in classes]
    k = min(map(len, of_class))
    rows = []
    for i in range(k):
        means = []
        for own in of_class:
            size, larger = divmod(len(own), k)  # the first blocks have one sample more
            start = i * size + min(i, larger)
            block = own[start : start + size + (i < larger)]
            means.append(sum(block) / len(block))
        rows.append(sum(means) / len(means))
    return rows


def literal_betting(gains, margin, level):
    """Wealth sample by sample; the stake of a sample uses the ones before it."""
    wealth, seen = 1.0, []
    for g in gains:
        mean = sum(seen) / len(seen) if seen else 0.0
        variance = (0.25 + sum((x - mean) ** 2 for x in seen)) / (len(seen) + 1)
        stake = min(0.9, math.sqrt(2 * math.log(1 / level) / (len(gains) * variance)))
        x = (g + margin) / (1 - margin)
        wealth *= 1 + stake * x
        seen.append(x)
    return min(1.0, 1 / wealth)


def literal_delong(old, new, labels, margin):
    """DeLong's variance of the difference, with all pairs of samples."""
    positive = [i for i, label in enumerate(labels) if label == 1]
    negative = [i for i, label in enumerate(labels) if label == 0]

    def right(scores, i, j):
        return 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0

    v10 = [[sum(right(s, i, j) for j in negative) / len(negative) for i in positive] for s in (old, new)]
    v01 = [[sum(right(s, i, j) for i in positive) / len(positive) for j in negative] for s in (old, new)]
    areas = [sum(values) / len(values) for values in v10]
    s10, s01 = np.cov(np.array(v10)), np.cov(np.array(v01))
    covariance = s10 / len(positive) + s01 / len(negative)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    z = (areas[1] - areas[0] + margin) / math.sqrt(variance)
    return areas[1] - areas[0], 0.5 * math.erfc(z / math.sqrt(2))


def test_balanced_gains_equal_literal_blocks():
    generator = np.random.default_rng(0)
    for _ in range(20):
        labels = generator.integers(0, 3, 25)
        gains = generator.integers(-1, 2, 25)
        expected = literal_balanced(gains.tolist(), labels.tolist(), [0, 1, 2])
        assert balanced_gains(gains, labels, [0, 1, 2]) == pytest.approx(expected, abs=1e-15)
    assert len(balanced_gains([1, 1], [0, 0], [0, 1])) == 0


@pytest.mark.parametrize(("margin", "level"), [(0.0, 0.1), (0.05, 0.1), (0.02, 0.01)])
def test_plugin_betting_p_value_equals_literal_wealth(margin, level):
    generator = np.random.default_rng(1)
    for shift in (-0.1, 0.1, 0.4):
        gains = np.clip(generator.normal(shift, 0.3, 40), -1, 1)
        expected = literal_betting(gains.tolist(), margin, level)
        assert plugin_betting_p_value(gains, margin, level) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("arguments", [([2.0], 0.0, 0.1), ([0.1], 1.0, 0.1), ([0.1], 0.0, 0.0)])
def test_plugin_betting_p_value_argument_out_of_range_raises(arguments):
    with pytest.raises(ValueError, match="expected"):
        plugin_betting_p_value(*arguments)


def test_pair_outcomes_round_ties_down():
    old = [0.9, 0.5, 0.2, 0.4, 0.1, 0.5, 0.3, 0.4]
    new = [0.9, 0.6, 0.3, 0.4, 0.1, 0.5, 0.3, 0.9]
    labels = [1, 1, 1, 1, 0, 0, 0, 0]
    # Pairs: right and right; tie and right (+1/2 -> 0); wrong and tie (+1/2 -> 0); tie and wrong (-1/2 -> -1).
    assert pair_outcomes(old, new, labels) == (1, 0, 4)
    assert pair_outcomes([0.1, 0.2], [0.3, 0.2], [1, 0]) == (0, 1, 1)
    assert pair_outcomes([0.1], [0.3], [1]) == (0, 0, 0)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_delong_p_value_equals_literal_covariances(margin):
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 60)
    old = np.round(generator.normal(labels, 1.5), 1)  # with ties
    new = np.round(generator.normal(labels, 1.0), 1)
    gain, p_value = literal_delong(old, new, labels, margin)
    assert auroc_gain(old, new, labels) == pytest.approx(gain, abs=1e-12)
    assert delong_p_value(old, new, labels, margin) == pytest.approx(p_value, rel=1e-9)


def test_delong_p_value_without_variance_or_samples_is_one():
    assert delong_p_value([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 0.05) == 1
    assert delong_p_value([0.1, 0.4], [0.4, 0.1], [0, 1], 0.05) == 1
    assert auroc_gain([0.1], [0.2], [1]) == 0


def right(a, b):
    return 1.0 if a > b else 0.5 if a == b else 0.0


def literal_macro(scores, counts, by_class):
    """AUROC of the samples of each class, with the class mix of all samples, pair by pair."""
    total, n = 0.0, sum(counts)
    for c, own in enumerate(by_class):
        for y, others in enumerate(by_class):
            if y != c:
                wins = [right(scores[i][c], scores[j][c]) for i in own for j in others]
                total += counts[y] / (n - counts[c]) * sum(wins) / len(wins)
    return total / len(counts)


def literal_blocks(own, k):
    """Blocks of nearly equal size, the first ones with one sample more."""
    size, larger = divmod(len(own), k)
    starts = [i * size + min(i, larger) for i in range(k + 1)]
    return [own[start:end] for start, end in pairwise(starts)]


def test_macro_auroc_gains_equal_literal_pairs_of_blocks():
    generator = np.random.default_rng(5)
    labels = np.r_[np.zeros(7, int), np.ones(3, int), np.full(5, 2)][generator.permutation(15)]
    old, new = (generator.integers(0, 4, (15, 3)) for _ in range(2))  # with ties
    by_class = [np.flatnonzero(labels == c).tolist() for c in range(3)]
    blocks = list(zip(*(literal_blocks(own, 3) for own in by_class), strict=True))
    expected = [literal_macro(new, (7, 3, 5), block) - literal_macro(old, (7, 3, 5), block) for block in blocks]
    assert macro_auroc_gains(old, new, labels, [0, 1, 2]) == pytest.approx(expected, abs=1e-15)
    assert len(macro_auroc_gains(old, new, labels * 0, [0, 1])) == len(macro_auroc_gains(old, new, labels, [0])) == 0


def test_macro_auroc_gains_of_one_block_are_the_gain_in_the_metric():
    generator = np.random.default_rng(6)
    labels = np.array([0, 0, 1, 2, 2, 2, 0])
    old, new = (generator.normal(size=(7, 3)) for _ in range(2))
    # The metric ranks probabilities of one row: equal row sums keep the order of the logits.
    values = [np.log(np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)) for scores in (old, new)]
    areas = [auroc(torch.from_numpy(scores), torch.from_numpy(labels), 3) for scores in values]
    assert macro_auroc_gains(*values, labels, [0, 1, 2]) == pytest.approx([areas[1] - areas[0]], abs=1e-12)
    assert auroc_gain(*values, labels, [0, 1, 2]) == pytest.approx(areas[1] - areas[0], abs=1e-12)


def test_macro_auroc_gains_have_the_true_gain_as_their_mean():
    """By enumeration: a sample of class c has one of two score vectors, each with probability 1/2."""
    generator = np.random.default_rng(7)
    labels, choices = (
        np.array([0, 0, 1, 1, 2, 2, 2]),
        generator.integers(0, 3, (2, 3, 2, 3)),
    )  # model, class, draw, column
    draws = [choices[:, labels, list(picked)] for picked in product((0, 1), repeat=7)]
    means = np.mean([macro_auroc_gains(old, new, labels, [0, 1, 2]) for old, new in draws], axis=0)
    counts, pairs = (2, 2, 3), [(0, 1), (2, 3), (4, 5)]  # both possible samples of each class, as if they were drawn
    areas = [literal_macro([vector for rows in model for vector in rows], counts, pairs) for model in choices]
    assert means == pytest.approx([areas[1] - areas[0]] * 2, abs=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_delong_p_value_of_several_classes_equals_literal_projections(margin):
    generator = np.random.default_rng(8)
    labels = generator.integers(0, 3, 45)
    old, new = (np.round(np.eye(3)[labels] + generator.normal(0, size, (45, 3)), 1) for size in (1.5, 1.0))
    counts = np.bincount(labels)
    by_class = [np.flatnonzero(labels == c).tolist() for c in range(3)]

    def projection(scores, i):
        own = labels[i]
        total = np.mean([right(scores[i][own], scores[j][own]) for j in range(45) if labels[j] != own])
        for c in {0, 1, 2} - {own}:
            wins = [right(scores[j][c], scores[i][c]) for j in by_class[c]]
            total += counts[own] / (45 - counts[c]) * np.mean(wins)
        return total / 3

    differences = np.array([projection(new, i) - projection(old, i) for i in range(45)])
    variance = sum(differences[own].var(ddof=1) / len(own) for own in by_class)
    gain = literal_macro(new, counts, by_class) - literal_macro(old, counts, by_class)
    assert auroc_gain(old, new, labels, [0, 1, 2]) == pytest.approx(gain, abs=1e-12)
    expected = 0.5 * math.erfc((gain + margin) / math.sqrt(2 * variance))
    assert delong_p_value(old, new, labels, margin, [0, 1, 2]) == pytest.approx(expected, rel=1e-9)


def test_two_columns_of_opposite_scores_equal_two_classes():
    generator = np.random.default_rng(9)
    labels = generator.integers(0, 2, 40)
    old, new = (np.round(generator.normal(labels, 1.0), 1) for _ in range(2))
    columns = [np.stack([-scores, scores], axis=1) for scores in (old, new)]
    assert auroc_gain(*columns, labels, [0, 1]) == pytest.approx(auroc_gain(old, new, labels), abs=1e-12)
    assert delong_p_value(*columns, labels, 0.02, [0, 1]) == pytest.approx(
        delong_p_value(old, new, labels, 0.02), rel=1e-9
    )


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_balanced_accuracy_exact_error_rate_is_at_most_the_level(margin):
    """All sequences of 5 pairs of one sample per class, at the boundary of the hypothesis."""
    level, size = 0.3, 5
    sequences = list(product((-1.0, -0.5, 0.0, 0.5, 1.0), repeat=size))
    accepted = np.array([plugin_betting_p_value(row, margin, level) <= level for row in sequences])
    index = np.array([[int(2 * g + 2) for g in row] for row in sequences])
    largest = 0.0
    for gain in np.linspace(-1, 1 - 2 * margin, 9):
        other = -2 * margin - gain  # the mean of both gains is minus the margin
        if abs(other) > 1:
            continue
        for first, second in product((0.0, 0.5, 1.0), repeat=2):
            marginals = []
            for mean, share in ((gain, first), (other, second)):
                differing = abs(mean) + share * (1 - abs(mean))  # from the fewest to all samples differ
                marginals.append([(differing - mean) / 2, 1 - differing, (differing + mean) / 2])
            of_sum = np.convolve(*marginals)
            largest = max(largest, float(of_sum[index].prod(axis=1)[accepted].sum()))
    assert 0 < largest <= level
