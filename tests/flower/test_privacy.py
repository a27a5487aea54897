"""Noise of a site's update: the site's own options decide, and the seed of the run does not give it away."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict

from fedekd.errors import UserError
from fedekd.federation import RoundOptions
from fedekd.federation.summary import _privacy
from fedekd.flower.apps import Settings, make_client_app
from fedekd.flower.description import require_agreement, shared_config
from fedekd.flower.engine import FlowerEngine
from fedekd.flower.messages import DESCRIBE, ROUND, arrays_of, from_arrays, pack, values_of
from fedekd.methods import FedeKD
from fedekd.privacy import GaussianMechanism

from .conftest import NUM_SITES, build, over_wire

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("empty_site_cache")]

State = dict[str, torch.Tensor]


def ask(options: list[str], folder: Path, message_type: str, values: dict[str, Any], state: Any = None) -> Message:
    """Reply of site 0, which starts in a new folder."""
    app = make_client_app(Settings(tuple(options), NUM_SITES, folder=str(folder)))
    context = Context(1, 5, {"number": 0}, RecordDict(), {})
    return over_wire(app(over_wire(Message(pack(values, state), 5, message_type)), context))


def change(options: list[str], folder: Path, proxy: State) -> torch.Tensor:
    reply = ask(options, folder, ROUND, {"round": 0, "version": 0, "comparison": None}, proxy)
    state = from_arrays(arrays_of(reply))
    return torch.cat([(state[name].double() - tensor.double()).flatten() for name, tensor in proxy.items()])


def test_site_adds_noise_that_does_not_repeat(options: list[str], proxy: State, tmp_path: Path) -> None:
    clip, noise = "--privacy.clipping_norm=0.05", "--privacy.noise_multiplier"
    clipped = change([*options, clip, f"{noise}=0"], tmp_path / "a", proxy)
    assert float(clipped.norm()) == pytest.approx(0.05, rel=1e-4)
    first, second = (change([*options, clip, f"{noise}=20"], tmp_path / name, proxy) - clipped for name in "bc")
    for values in (first, second):
        assert float(values.std()) == pytest.approx(1.0, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02


def test_summary_says_that_the_noise_of_sites_is_from_the_operating_system() -> None:
    run = SimpleNamespace(
        privacy=GaussianMechanism(1.0, 1.0),
        options=RoundOptions(rounds=2),
        num_clients=2,
        seed=0,
        progress=SimpleNamespace(history=[{"comm/updates": 2}] * 2),
        method=FedeKD(),
        engine=FlowerEngine(None, {}),  # type: ignore[arg-type]
    )
    account = _privacy(run)["privacy"]  # type: ignore[arg-type]
    assert account["noise"] == "operating system"
    assert account["updates"] == [2, 2]


def test_server_and_sites_must_agree_on_the_noise(options: list[str], tmp_path: Path) -> None:
    method, _, spec = build(options)
    expected = shared_config(method, spec, GaussianMechanism(2.0, 1.0))
    for noise, is_equal in ((2.0, True), (1.0, False)):
        description = values_of(ask([*options, f"--privacy.noise_multiplier={noise}"], tmp_path, DESCRIBE, {}))
        if is_equal:
            require_agreement(description, expected)
        else:
            with pytest.raises(UserError, match=r"privacy\.noise_multiplier: expected 2\.0, got 1\.0"):
                require_agreement(description, expected)
    with pytest.raises(UserError, match=r"privacy: expected .*noise_multiplier"):
        require_agreement(values_of(ask(options, tmp_path, DESCRIBE, {})), expected)
