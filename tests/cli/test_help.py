from __future__ import annotations

import re

import pytest

from fedekd.cli import COMMANDS, main

FIT_TITLES = [
    "options",
    "Rounds",
    "Baselines",
    "Method",
    "Data",
    "Client",
    "Private model",
    "Proxy model",
    "Optimizer",
    "Scheduler",
    "Trainer",
    "Engine",
    "Do no harm",
    "Privacy",
    "Metrics",
    "Logging",
]


def help_text(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_fit_help_has_a_title_per_group_and_is_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text("fit", capsys, monkeypatch)
    assert re.findall(r"(?m)^(\w.*):$", text) == FIT_TITLES
    assert "Base class" not in text  # of a docstring of torch
    assert text.count("\n") < 3.5 * len(re.findall(r"(?m)^  --", text))
    assert "--method.help" in text
    assert "[0.1]" in text  # a default
    assert "[(0.6, 0.2, 0.2)]" in text


def test_fit_help_lists_the_methods_and_the_default_classes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = help_text("fit", capsys, monkeypatch).split()
    assert {"FedeKD,", "FedAvg,", "ProxyEnsemble,", "Local,"} <= set(words)
    assert {"[FedeKD]", "[PrivateCNN]", "[ProxyCNN]", "[Adam]", "[Sequential]"} <= set(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_every_option_has_a_text(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(command, capsys, monkeypatch)
    entries = re.split(r"(?m)^  (?=\S)", text)[1:]
    assert entries
    for entry in entries:
        words = re.sub(r"^(-\S+( \S*[A-Z\[{]\S*( \| \S+)*( VALUE)?)?,? ?)+", "", entry)
        assert len(words.split()) >= 2, entry
