"""A policy's file, its checks, and that it serves one network only."""

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

from fedekd.early_exit import ExitPolicy, early_exit_forward, network_fingerprint
from fedekd.errors import UserError
from fedekd.models import MultiExitNetwork, PrivateCNN, multi_exit

INF = math.inf


def policy(*thresholds: float, **values) -> ExitPolicy:
    """Of thresholds before the last."""
    all_ = (*thresholds, -INF)
    defaults = {"search_bounds": all_, "certified": (False,) * len(all_), "alpha": 0.05, "delta": 0.1, "mode": "ltt"}
    return ExitPolicy(all_, **{**defaults, **values})


def network(activation: type[nn.Module] = nn.ReLU, exits: int = 2) -> MultiExitNetwork:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 4, 3), activation(), nn.Flatten())
    later = [nn.Linear(16, 16) for _ in range(exits - 1)]
    return MultiExitNetwork([first, *later], [nn.Linear(16, 3) for _ in range(exits)])


def of(served: MultiExitNetwork, **values) -> ExitPolicy:
    return policy(0.5, network=network_fingerprint(served), **values)


numbers = st.floats(allow_nan=False, width=64)
counts = st.integers(0, 10**9)


@given(st.lists(numbers, min_size=1, max_size=4), st.data())
def test_a_policy_comes_back_to_the_last_digit(thresholds, data):
    exits = len(thresholds) + 1
    each = lambda what: tuple(data.draw(st.lists(what, min_size=exits, max_size=exits)))  # noqa: E731
    search_bounds = tuple(min(t, data.draw(numbers)) for t in thresholds)
    before = policy(
        *thresholds,
        search_bounds=(*search_bounds, -INF),
        certified=each(st.booleans()),
        alpha=data.draw(st.floats(1e-9, 1)),
        delta=data.draw(st.floats(1e-9, 1)),
        score=data.draw(st.sampled_from(["max_softmax", "margin", "entropy"])),
        samples=data.draw(counts),
        tuning_samples=data.draw(counts),
        leaving=each(counts),
        errors=each(counts),
        needed=each(st.none() | counts),
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
    assert strict["format"] == 2


def test_a_file_is_the_same_policy(tmp_path):
    before = policy(INF, float(np.float32(0.9)), needed=(335, None, None), versions={"torch": "2"})
    path = tmp_path / "deep" / "policy.json"
    before.save(path)
    assert ExitPolicy.load(path) == before
    assert [each.name for each in path.parent.iterdir()] == ["policy.json"]


def changed_file(**values) -> str:
    return json.dumps({**json.loads(policy(0.5).to_json()), **values})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no exit policy"),
        ("{", "no exit policy"),
        ("5", "no exit policy"),
        ("null", "no exit policy"),
        ("[1]", "no exit policy"),
        ("{}", "no exit policy: 'format'"),
        (policy(0.5).to_json()[:-20], "no exit policy"),
        (changed_file(together=0), "one of 0 that hold together; at least 1"),
        (changed_file(together="two"), "one of 'two' that hold together"),
        (changed_file(format=1), "layout 1, and this version reads 2"),
        (changed_file(thresholds=None), "no exit policy"),
        (changed_file(thresholds=["many", "-inf"]), "no exit policy"),
        (changed_file(thresholds=["nan", "-inf"]), "is no number"),
        (changed_file(search_bounds=[math.nan, "-inf"]), "is no number"),
        (changed_file(thresholds=[0.5, 0.6]), "last exit's threshold is 0.6"),
        (changed_file(search_bounds=["-inf"]), "2 thresholds, 1 bands and 2 certificates"),
        (changed_file(thresholds=[], search_bounds=[], certified=[]), "0 thresholds"),
        (changed_file(surprise=1), "surprise"),
        (changed_file(_verified={}), "_verified"),
    ],
)
def test_what_is_no_policy_is_told_in_one_line(tmp_path, text, words):
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as told:
        ExitPolicy.load(path)
    assert str(told.value).startswith(f"{path}: ")
    assert "\n" not in str(told.value)


def test_missing_and_unreadable_files_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"x\.json: there is no such file"):
        ExitPolicy.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="not text in UTF-8"):
        ExitPolicy.load(tmp_path / "x.json")


def test_which_policies_let_images_leave_without_a_promise():
    assert policy(0.5).has_no_guarantee
    assert policy(0.5, INF).has_no_guarantee
    assert policy(INF, 0.5).has_no_guarantee
    assert not policy(INF, INF).has_no_guarantee
    assert not policy().has_no_guarantee  # one exit: nobody leaves early
    assert not policy(INF, 0.5, certified=(False, True, False)).has_no_guarantee


def test_it_serves_its_network_in_any_layout_and_after_a_copy():
    served = network()
    own = of(served)
    own.require(served)
    own.require(served.to(memory_format=torch.channels_last))
    own.require(copy.deepcopy(served))
    moved = network().to(memory_format=torch.channels_last)
    assert not moved.stages[0][0].weight.is_contiguous()
    ExitPolicy.from_json(own.to_json()).require(moved)
    again = network(nn.Tanh)
    again.load_state_dict(served.state_dict())
    for other in (again, network().double(), network(nn.Tanh)):
        with pytest.raises(UserError, match=f"calibrated for network {own.network[:12]}, and this is"):
            own.require(other)


def test_it_serves_no_network_of_other_exits():
    with pytest.raises(UserError, match="is for 2 exits, and the network has 3"):
        policy(0.5).require(network(exits=3))
    with pytest.raises(UserError, match="is for 3 exits, and the network has 2"):
        policy(0.5, INF).predict(network(), torch.zeros(1, 2, 4, 4))
    policy(0.5).require(network())  # calibrated for nobody in particular


def step(served: MultiExitNetwork, fused: bool) -> None:
    optimizer = torch.optim.AdamW(served.parameters(), lr=0.1, fused=fused)
    sum(logits.square().sum() for logits in served(torch.randn(3, 2, 4, 4))).backward()
    optimizer.step()


def add(served: MultiExitNetwork) -> None:
    with torch.no_grad():
        served.heads[0].bias[1] += 1e-3


def load(served: MultiExitNetwork) -> None:
    served.load_state_dict({name: value + 1e-3 for name, value in served.state_dict().items()})


def replace_weight(served: MultiExitNetwork) -> None:
    served.heads[0].weight = nn.Parameter(served.heads[0].weight.detach() + 1e-3)


def assign_data(served: MultiExitNetwork) -> None:
    served.heads[0].weight.data = served.heads[0].weight.detach() + 1e-3


def change_data(served: MultiExitNetwork) -> None:
    served.heads[0].weight.data.add_(1e-3)


def swap_activation(served: MultiExitNetwork) -> None:
    served.stages[0][1] = nn.Tanh()


CHANGES = [
    add,
    replace_weight,
    lambda served: step(served, fused=False),
    load,
    lambda served: step(served, fused=True),
    assign_data,
    swap_activation,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_was_changed_after_it_was_accepted_is_refused(change):
    served = network()
    own, x = of(served), torch.randn(2, 2, 4, 4)
    own.predict(served, x)
    own.predict(served, x)
    change(served)
    assert network_fingerprint(served) != own.network
    with pytest.raises(UserError, match="calibrate this one"):
        own.predict(served, x)


def test_what_goes_past_autograd_is_seen_by_a_policy_that_is_read_anew():
    """Neither identity, place nor version counter of a tensor tells: require's docstring says so."""
    served = network()
    own = of(served)
    own.require(served)
    change_data(served)
    with pytest.raises(UserError, match="calibrate this one"):
        ExitPolicy.from_json(own.to_json()).require(served)


def test_a_network_changed_before_and_restored_is_accepted():
    served = network()
    own, kept = of(served), copy.deepcopy(served.state_dict())
    add(served)
    with pytest.raises(UserError, match="calibrate this one"):
        own.require(served)
    served.load_state_dict(kept)
    own.require(served)
    other = network(nn.Tanh)
    with pytest.raises(UserError, match="calibrate this one"):
        own.require(other)


def test_an_unchanged_network_is_hashed_once(monkeypatch):
    served, hashed = network(), []
    own = of(served)
    monkeypatch.setattr(
        "fedekd.early_exit.policy.network_fingerprint", lambda each: hashed.append(1) or network_fingerprint(each)
    )
    for _ in range(5):
        own.predict(served, torch.zeros(1, 2, 4, 4))
    assert hashed == [1]


def test_predictions_are_those_of_inference_and_assignment():
    served = multi_exit(PrivateCNN(1, 8, 4), 4).eval()
    x = torch.randn(40, 1, 8, 8)
    with torch.no_grad():
        scores = torch.stack([each.softmax(1).amax(1) for each in served(x)], 1).double().numpy()
    cut = float(np.median(scores[:, 0])) + 1e-6
    own = replace(policy(cut, INF), search_bounds=(cut - 1e-3, INF, -INF), network=network_fingerprint(served))
    logits, exits = own.predict(served, x)
    expected = early_exit_forward(served, x, own.thresholds, own.search_bounds)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(exits, expected.exits)
    assert exits.tolist() == own.assign(scores).tolist()
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
def test_heads_count_as_evaluated_where_they_decide_something(thresholds, search_bounds, evaluated):
    assert policy(*thresholds, search_bounds=(*search_bounds, -INF)).evaluated == evaluated


def test_a_band_above_its_threshold_is_refused():
    with pytest.raises(UserError, match="search_bound"):
        policy(0.5, 0.2, search_bounds=(0.9, 0.2, -INF))


def test_a_policy_in_use_can_travel_to_another_process():
    served = network()
    own = of(served)
    own.require(served)
    assert pickle.loads(pickle.dumps(own)) == own
