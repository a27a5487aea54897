"""`make bench`: it runs, and all contenders train the same model."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

from fedekd.methods import ClientOptions, FedeKD
from fedekd.modules import (
    DistillationLoss,
    GatedDistillationLoss,
    LossTerm,
    ModelOutput,
    SupervisedLoss,
    TrainerFactory,
)
from fedekd.modules.energies import DisagreementEnergy
from perf import bare, script
from perf.__main__ import main
from perf.setting import Workload, make_setting


@pytest.fixture
def setting() -> Workload:
    trainer = TrainerFactory(accelerator="cpu", precision="32-true", threads=1)
    return make_setting(trainer, root="nowhere", samples=600)


@pytest.mark.slow
def test_main_prints_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--accelerator cpu --root nowhere --samples 400 --repetitions 1 --steps 1"
    options += " --only phases,where,round,stacked,startup"
    monkeypatch.setattr("sys.argv", ["bench", *options.split()])
    main()
    output = capsys.readouterr().out
    assert "random images of FashionMNIST's shape" in output
    for line in (
        "| private | (b) fedekd | ",
        "| private | (b) fedekd / (a) bare loop | ",
        "| round | (c) script / ",
        "| backward | ",
        "| 8x8 | FedeKD | ",
    ):
        assert line in output
    assert re.search(r"`python orchestrator.py --help`: \d+\.\d\d s", output)


@pytest.mark.parametrize(
    ("by_hand", "objectives"),
    [
        (
            bare.gated,
            [SupervisedLoss("classification"), GatedDistillationLoss("classification", DisagreementEnergy(), 1.0, 1.0)],
        ),
        (bare.distilled, [DistillationLoss("classification")]),
    ],
)
def test_contenders_have_equal_losses(by_hand: bare.Loss, objectives: list[LossTerm]) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(64, 10, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(64, 10, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 10, (64,), generator=generator)
    ours = sum(term(ModelOutput((student,)), ModelOutput((teacher,)), y, lambda *_: None) for term in objectives)
    theirs = by_hand(student.log_softmax(dim=1), teacher.log_softmax(dim=1), y)
    scripted = script.gated(student, teacher, y) if by_hand is bare.gated else script.distilled(student, teacher)
    (expected,) = torch.autograd.grad(ours, student, retain_graph=True)
    # The script adds 1e-8 inside its logarithms.
    for loss, tolerance in ((theirs, 1e-9), (scripted, 1e-6)):
        torch.testing.assert_close(loss, ours, rtol=tolerance, atol=0)
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("phase", ["private", "proxy"])
def test_contenders_take_the_same_step(phase: str, setting: Workload) -> None:
    """One batch, one epoch. Adam's first step is 1e-4 times the sign of the gradient, which may flip near 0."""
    indices = setting.data.clients[0].train[: setting.batch_size]
    method = FedeKD(proxy_epochs=1)
    setting.spec = replace(setting.spec, client=ClientOptions(local_epochs=1))
    client = setting.client(method, indices)
    torch.manual_seed(0)
    received = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in method.server_state.items()}
    client.networks["proxy"].load_state_dict(received)
    private, proxy = (copy.deepcopy(client.networks[role]) for role in ("private", "proxy"))
    handed = copy.deepcopy(private), copy.deepcopy(proxy)
    getattr(bare, f"{phase}_phase")(setting, private, proxy, indices)
    scripted = getattr(script, f"{phase}_phase")(setting, *handed, indices)
    if phase == "private":
        method.receive(client, received, 1)
    else:
        method.prepare_update(client, 0)
    ours = torch.cat([parameter.flatten() for parameter in client.networks[phase].parameters()])
    for network in (private if phase == "private" else proxy, scripted):
        theirs = torch.cat([parameter.flatten() for parameter in network.parameters()])
        assert ((ours - theirs).abs() > 2e-6).double().mean() < 0.01
