"""File, validation and network check of an exit policy."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedekd.atomic import seal_json, unseal_json
from fedekd.early_exit import ExitPolicy, early_exit_forward, network_fingerprint
from fedekd.early_exit.policy import GroupExits
from fedekd.early_exit.scoring import ExitOutputs
from fedekd.errors import UserError
from fedekd.models import MultiExitNetwork, PrivateCNN, multi_exit

INF = math.inf


def policy(*thresholds: float, **values) -> ExitPolicy:
    """Create a policy from the thresholds before the last."""
    all_ = (*thresholds, -INF)
    defaults = {
        "search_bounds": all_,
        "certified": (False,) * len(all_),
        "target_risk": 0.05,
        "confidence": 0.9,
        "mode": "ltt",
    }
    return ExitPolicy(all_, **{**defaults, **values})


def network(activation: type[nn.Module] = nn.ReLU, exits: int = 2) -> MultiExitNetwork:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 4, 3), activation(), nn.Flatten())
    later = [nn.Linear(16, 16) for _ in range(exits - 1)]
    return MultiExitNetwork([first, *later], [nn.Linear(16, 3) for _ in range(exits)])


def policy_for(model: MultiExitNetwork, **values) -> ExitPolicy:
    return policy(0.5, network=network_fingerprint(model), **values)


numbers = st.floats(allow_nan=False, width=64)
counts = st.integers(0, 10**9)


@given(st.lists(numbers, min_size=1, max_size=4), st.data())
def test_json_round_trip_is_lossless(thresholds, data):
    exits = len(thresholds) + 1
    each = lambda what: tuple(data.draw(st.lists(what, min_size=exits, max_size=exits)))  # noqa: E731
    search_bounds = tuple(min(t, data.draw(numbers)) for t in thresholds)
    before = policy(
        *thresholds,
        search_bounds=(*search_bounds, -INF),
        certified=each(st.booleans()),
        target_risk=data.draw(st.floats(1e-9, 1)),
        confidence=data.draw(st.floats(1e-9, 1)),
        score=data.draw(st.sampled_from(["max_softmax", "margin", "entropy"])),
        samples=data.draw(counts),
        tuning_samples=data.draw(counts),
        exit_counts=each(counts),
        error_counts=each(counts),
        required_samples=each(st.none() | counts),
        network="ab" * 32,
        versions={"fedekd": "0.1.0", "torch": "2.5"},
    )
    text = before.to_json()
    after = ExitPolicy.from_json(text)
    assert after == before
    for name in (each.name for each in fields(before) if each.init):
        assert repr(getattr(after, name)) == repr(getattr(before, name)), name  # -0.0 and 0.0, tuples and lists
    assert after.to_json() == text
    strict = json.loads(text, parse_constant=pytest.fail)  # no Infinity or NaN: JSON has none
    assert strict["format"] == 5


def test_save_and_load_round_trip(tmp_path):
    before = policy(INF, float(np.float32(0.9)), required_samples=(335, None, None), versions={"torch": "2"})
    path = tmp_path / "deep" / "policy.json"
    before.save(path)
    assert ExitPolicy.load(path) == before
    assert [each.name for each in path.parent.iterdir()] == ["policy.json"]


def changed_file(**values) -> str:
    """A policy with other values and a valid checksum."""
    return seal_json({**unseal_json(policy(0.5).to_json().encode()), **values}).decode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "exit policy: invalid content"),
        ("{", "exit policy: invalid content"),
        ("5", "exit policy: invalid content"),
        ("null", "exit policy: invalid content"),
        ("[1]", "exit policy: invalid content"),
        ("{}", "exit policy: invalid content: KeyError: 'format'"),
        (policy(0.5).to_json()[:-20], "exit policy: invalid content"),
        (changed_file(simultaneous_clients=0), "expected simultaneous_clients of at least 1, got 0"),
        (changed_file(simultaneous_clients="two"), "expected simultaneous_clients of at least 1, got 'two'"),
        (changed_file(format=4), "expected format 5, got 4. Run `calibrate` again"),
        (policy(0.5).to_json().replace("0.5", "0.4"), "does not match its SHA-256. Run `calibrate` again"),
        (changed_file(thresholds=None), "exit policy: invalid content"),
        (changed_file(thresholds=["many", "-inf"]), "exit policy: invalid content"),
        (changed_file(thresholds=["nan", "-inf"]), "got NaN"),
        (changed_file(search_bounds=[math.nan, "-inf"]), "got NaN"),
        (changed_file(thresholds=[0.5, 0.6]), "expected -inf as the threshold of the last exit, got 0.6"),
        (changed_file(search_bounds=["-inf"]), "at least 1 each, got 2, 1 and 2"),
        (changed_file(thresholds=[], search_bounds=[], certified=[]), "at least 1 each, got 0, 0 and 0"),
        (changed_file(surprise=1), "surprise"),
        (changed_file(_check={}), "_check"),
    ],
)
def test_load_invalid_content_raises_one_line_error(tmp_path, text, words):
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        ExitPolicy.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_load_missing_or_binary_file_raises(tmp_path):
    with pytest.raises(UserError, match=r"x\.json: file not found"):
        ExitPolicy.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="not UTF-8 text"):
        ExitPolicy.load(tmp_path / "x.json")


def test_has_no_guarantee_requires_an_open_uncertified_exit():
    assert policy(0.5).has_no_guarantee
    assert policy(0.5, INF).has_no_guarantee
    assert policy(INF, 0.5).has_no_guarantee
    assert not policy(INF, INF).has_no_guarantee
    assert not policy().has_no_guarantee  # a single exit: no early exits
    assert not policy(INF, 0.5, certified=(False, True, False)).has_no_guarantee


def test_require_accepts_copies_and_rejects_other_networks():
    model = network()
    policy_of_model = policy_for(model)
    policy_of_model.require(model)
    policy_of_model.require(model.to(memory_format=torch.channels_last))
    policy_of_model.require(copy.deepcopy(model))
    moved = network().to(memory_format=torch.channels_last)
    assert not moved.stages[0][0].weight.is_contiguous()
    ExitPolicy.from_json(policy_of_model.to_json()).require(moved)
    again = network(nn.Tanh)
    again.load_state_dict(model.state_dict())
    for other in (again, network().double(), network(nn.Tanh)):
        with pytest.raises(
            UserError, match=f"expected the network {policy_of_model.network[:12]} it was calibrated for"
        ):
            policy_of_model.require(other)


def test_require_other_number_of_exits_raises():
    with pytest.raises(UserError, match="expected a network with 2 exits, got 3"):
        policy(0.5).require(network(exits=3))
    with pytest.raises(UserError, match="expected a network with 3 exits, got 2"):
        policy(0.5, INF).predict(network(), torch.zeros(1, 2, 4, 4))
    policy(0.5).require(network())  # an empty fingerprint accepts any network


def step(model: MultiExitNetwork, fused: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    sum(logits.square().sum() for logits in model(torch.randn(3, 2, 4, 4))).backward()
    optimizer.step()


def add(model: MultiExitNetwork) -> None:
    with torch.no_grad():
        model.heads[0].bias[1] += 1e-3


def load(model: MultiExitNetwork) -> None:
    model.load_state_dict({name: value + 1e-3 for name, value in model.state_dict().items()})


def replace_weight(model: MultiExitNetwork) -> None:
    model.heads[0].weight = nn.Parameter(model.heads[0].weight.detach() + 1e-3)


def assign_data(model: MultiExitNetwork) -> None:
    model.heads[0].weight.data = model.heads[0].weight.detach() + 1e-3


def change_data(model: MultiExitNetwork) -> None:
    model.heads[0].weight.data.add_(1e-3)


def swap_activation(model: MultiExitNetwork) -> None:
    model.stages[0][1] = nn.Tanh()


CHANGES = [
    add,
    replace_weight,
    lambda model: step(model, fused=False),
    load,
    lambda model: step(model, fused=True),
    assign_data,
    swap_activation,
]


@pytest.mark.parametrize("change", CHANGES)
def test_predict_changed_network_raises(change):
    model = network()
    policy_of_model, x = policy_for(model), torch.randn(2, 2, 4, 4)
    policy_of_model.predict(model, x)
    policy_of_model.predict(model, x)
    change(model)
    assert network_fingerprint(model) != policy_of_model.network
    with pytest.raises(UserError, match="calibrate this one"):
        policy_of_model.predict(model, x)


def test_require_data_changed_in_place_is_noticed_by_a_new_policy():
    """In-place writes to tensor.data change neither identity nor version counter (see FingerprintCheck)."""
    model = network()
    policy_of_model = policy_for(model)
    policy_of_model.require(model)
    change_data(model)
    with pytest.raises(UserError, match="calibrate this one"):
        ExitPolicy.from_json(policy_of_model.to_json()).require(model)


def test_require_restored_network_is_accepted():
    model = network()
    policy_of_model, kept = policy_for(model), copy.deepcopy(model.state_dict())
    add(model)
    with pytest.raises(UserError, match="calibrate this one"):
        policy_of_model.require(model)
    model.load_state_dict(kept)
    policy_of_model.require(model)
    other = network(nn.Tanh)
    with pytest.raises(UserError, match="calibrate this one"):
        policy_of_model.require(other)


def test_predict_hashes_unchanged_network_once(monkeypatch):
    model, hashed = network(), []
    policy_of_model = policy_for(model)
    monkeypatch.setattr(
        "fedekd.early_exit.fingerprint.network_fingerprint", lambda each: hashed.append(1) or network_fingerprint(each)
    )
    for _ in range(5):
        policy_of_model.predict(model, torch.zeros(1, 2, 4, 4))
    assert hashed == [1]


def test_predict_equals_forward_and_assign():
    model = multi_exit(PrivateCNN(1, 8, 4), 4).eval()
    x = torch.randn(40, 1, 8, 8)
    with torch.no_grad():
        scores = torch.stack([each.softmax(1).amax(1) for each in model(x)], 1).double().numpy()
    cut = float(np.median(scores[:, 0])) + 1e-6
    policy_of_model = replace(
        policy(cut, INF), search_bounds=(cut - 1e-3, INF, -INF), network=network_fingerprint(model)
    )
    logits, exits = policy_of_model.predict(model, x)
    expected = early_exit_forward(model, x, policy_of_model.thresholds, policy_of_model.search_bounds)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(exits, expected.exits)
    assert exits.tolist() == policy_of_model.assign(scores).tolist()
    assert 0 < int((exits == 0).sum()) < 40


@pytest.mark.parametrize(
    ("thresholds", "search_bounds", "evaluated"),
    [
        ((0.5, 0.5), (0.4, 0.5), (True, True, True)),
        ((INF, 0.5), (0.4, 0.5), (True, True, True)),
        ((INF, 0.5), (INF, 0.5), (False, True, True)),
        ((0.5, INF), (0.5, 0.4), (True, False, True)),
        ((INF, INF), (0.4, 0.4), (False, False, True)),
    ],
)
def test_evaluated_heads(thresholds, search_bounds, evaluated):
    assert policy(*thresholds, search_bounds=(*search_bounds, -INF)).evaluated == evaluated


def test_policy_search_bound_above_threshold_raises():
    with pytest.raises(UserError, match=r"expected a search bound of at most the threshold 0\.5 at exit 1, got 0\.9"):
        policy(0.5, 0.2, search_bounds=(0.9, 0.2, -INF))


def test_close_exit_leaves_the_samples_of_other_exits():
    scores = np.random.default_rng(0).uniform(size=(200, 4))
    before = policy(
        *(0.8, 0.7, 0.6),
        search_bounds=(0.6, 0.65, 0.6, -INF),
        certified=(True, True, True, False),
        exit_counts=(5, 4, 3, 2),
        error_counts=(1, 1, 0, 1),
    )
    after = before.close(1, "too many errors")
    exits, closed = before.assign(scores), after.assign(scores)
    assert (exits == 1).any()
    assert (closed[exits != 1] == exits[exits != 1]).all()
    assert (closed[exits == 1] == 3).all()
    assert (after.certified, after.closed) == ((True, False, True, False), ("", "too many errors", "", ""))
    assert (after.exit_counts, after.error_counts) == ((5, 0, 3, 6), (1, 0, 0, 1))
    assert ExitPolicy.from_json(after.to_json()) == after
    assert after.close(0, "late").closed == ("late", "too many errors", "", "")
    assert "closed" not in json.loads(before.to_json())
    with pytest.raises(ValueError, match="exit_: expected an index"):
        before.close(3, "last")
    with pytest.raises(UserError, match="expected 2 reasons"):
        policy(0.5, closed=("x",))


def test_close_exit_closes_it_for_each_group():
    parts = [
        GroupExits(name, (threshold, 0.7, -INF), (0.4, 0.7, -INF), (True, True, False), 6, (1, 2, 3), (1, 0, 1))
        for name, threshold in (("A", 0.5), ("B", 0.6))
    ]
    before = policy(INF, INF, search_bounds=(INF, INF, -INF), group_by="scanner", groups=tuple(parts))
    after = before.close(0, "drift")
    assert [group.thresholds for group in after.groups] == [(INF, 0.7, -INF)] * 2
    assert [group.search_bounds for group in after.groups] == [(0.4, 0.7, -INF)] * 2
    assert [group.exit_counts for group in after.groups] == [(0, 2, 4)] * 2
    assert (after.open_exits, before.open_exits) == ((False, True), (True, True))
    scores, groups = np.array([[0.9, 0.9, 0.0], [0.3, 0.9, 0.0]]), np.zeros((2, 3), dtype=np.int64)
    assert before.assign(scores, groups).tolist() == [0, 1]
    assert after.assign(scores, groups).tolist() == [2, 1]
    assert ExitPolicy.from_json(after.to_json()) == after


def test_grouping_of_a_loaded_policy_has_the_classes_of_its_groups():
    parts = tuple(GroupExits(name, (0.5, -INF), (0.5, -INF), (True, False)) for name in "bd")
    saved = policy(0.5, group_by="predicted_class", groups=parts, shared_thresholds=True, group_classes=(1, 3))
    grouping = ExitPolicy.from_json(saved.to_json()).grouping
    logits = torch.eye(4)[:, None, :].repeat(1, 2, 1)
    assert grouping.index(ExitOutputs(logits, torch.arange(4)))[:, 0].tolist() == [-1, 0, -1, 1]
    assert "group_classes" not in json.loads(policy(0.5).to_json())


def test_policy_in_use_can_be_pickled():
    model = network()
    policy_of_model = policy_for(model)
    policy_of_model.require(model)
    assert pickle.loads(pickle.dumps(policy_of_model)) == policy_of_model


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"group_by": "scanner"}, "expected groups of 'scanner', got 0 groups"),
        ({"groups": [{"name": "A", "thresholds": ["inf"], "search_bounds": ["inf"], "certified": [False]}]}, "got 1"),
        (
            {
                "group_by": "scanner",
                "groups": [{"name": "A", "thresholds": [0.5], "search_bounds": [0.6], "certified": [False]}],
            },
            "at exit 1, got 0.6 .group 'A'.",
        ),
        ({"group_by": "x", "groups": [3]}, "invalid content"),
    ],
)
def test_load_invalid_groups_raises_one_line_error(values, words):
    with pytest.raises(UserError, match=words):
        ExitPolicy.from_json(changed_file(**values))
