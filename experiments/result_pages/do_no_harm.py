"""Tables of the do-no-harm tests."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pandas as pd

from experiments.result_pages.common import RESULTS, markdown, minus, read, spread
from fedekd.do_no_harm.rule import DoNoHarm

MARGINS = (0.0, 0.005, 0.01, 0.02)

#: Gain in test accuracy that a rule should find.
LARGE_GAIN = 0.05


#: Tests, as printed.
TESTS = {"sign": "sign test", "unconditional": "unconditional test"}


def _accepted(clients: pd.DataFrame, rule: DoNoHarm) -> pd.Series:
    """True for each client whose comparison deploys the federated model."""
    counts = clients[["worse", "better", "samples"]].astype(int).itertuples(index=False)
    return pd.Series([rule.p_value(*row) <= rule.level for row in counts], index=clients.index)


def do_no_harm(grid: str) -> str:
    """Delta if all clients adopt the federated model, and if an exact test decides."""
    rows = []
    for method, group in read(f"{grid}/fashionmnist.csv").groupby("method"):
        runs = [json.loads(text) for text in group.sort_values("seed")["evidence"]]
        rule = DoNoHarm.from_stored(runs[0]["rule"])
        frames = [pd.DataFrame(run["clients"]).assign(run=index) for index, run in enumerate(runs)]
        clients = pd.concat(frames, ignore_index=True).dropna(subset=["samples"])
        gain = clients["score"] - clients["local"]
        adopted = {"all clients adopt it": gain.notna()}
        for margin, test in product(MARGINS, TESTS):
            decisions = _accepted(clients, replace(rule, margin=margin, test=test))
            adopted[f"{TESTS[test]}, margin {margin:g}"] = decisions
        for rule_name, takes in adopted.items():
            of_run = gain.where(takes, 0.0).groupby(clients["run"])
            deltas = [minus(spread(values, True)) for values in (of_run.mean(), of_run.min())]
            share = f"{takes.sum()} of {len(takes)}"
            rows.append([method, rule_name, share, *deltas, str(len(runs))])
    title = "FashionMNIST, alpha 0.1, confidence 0.9"
    return markdown([title, "rule", "clients that adopt it", "Delta avg", "Delta worst", "seeds"], rows)


def _cells(frame: pd.DataFrame, column: str, text: pd.Series) -> list[list[str]]:
    """Rows of texts per setting, one cell per value of `column`."""
    keys = [name for name in ("samples", "margin", "differing") if name in frame]
    table = frame.assign(text=text).pivot(index=keys, columns=column, values="text")
    return [[f"{key[0]:,.0f}", *(f"{value:g}" for value in key[1:]), *texts] for key, texts in table.T.items()]


def exact_level() -> str:
    """Largest probability of a wrong decision by number of samples, margin and level."""
    frame = read("exact_test/level.csv").sort_values("level", ascending=False).drop(columns="differing")
    levels = [f"level {level:g}" for level in sorted(frame["level"].unique())]
    return markdown(["n", "margin", *levels], _cells(frame, "level", frame["worst"].map("{:.5f}".format)))


def exact_power() -> str:
    """Power of the sign test and of the unconditional test, and their bound."""
    frame = read("exact_test/power.csv")
    parts = [frame[name].map("{:.2f}".format) for name in ("sign", "unconditional", "bound")]
    gains = [f"gain {gain:g}" for gain in sorted(frame["gain"].unique())]
    return markdown(["n", "margin", "q", *gains], _cells(frame, "gain", parts[0] + ", " + parts[1] + ", " + parts[2]))


def exact_loss() -> str:
    """Largest difference of the bound and the power where the bound is at least 0.3."""
    frame = read("exact_test/power.csv")
    return f"{(frame['bound'] - frame['unconditional'])[frame['bound'] >= 0.3].max():.3f}"


def _compared_clients(method: str) -> pd.DataFrame:
    """One row per client of the hospital grid that compared classifiers."""
    clients = []
    for path in sorted((RESULTS / "hospital").glob("*.csv")):
        frame = pd.read_csv(path)
        for run in frame[(frame["method"] == method) & (frame["metric"] == "accuracy")].itertuples():
            of_run = pd.DataFrame(json.loads(run.evidence)["clients"])
            clients.append(of_run.assign(run=f"{run.dataset} {run.alpha} {run.seed}"))
    return pd.concat(clients, ignore_index=True).dropna(subset=["samples"])


def hospital_decisions(method: str) -> str:
    """Clients of the hospital grid that take the model, by both tests."""
    clients, rows = _compared_clients(method), []
    gain = clients["score"] - clients["local"]
    is_large = gain > LARGE_GAIN
    adopted = {("", "all clients take it"): gain.notna()}
    for margin, test in product((0.0, 0.01), TESTS):
        adopted[f"{margin:g}", TESTS[test]] = _accepted(clients, DoNoHarm(margin=margin, test=test))
    for (margin, name), takes in adopted.items():
        of_run = gain.where(takes, 0.0).groupby(clients["run"])
        deltas = [minus(f"{value:+.4f}") for value in (of_run.mean().mean(), of_run.min().mean())]
        taken = [f"{takes.sum()} of {len(takes)}", f"{(takes & is_large).sum()} of {is_large.sum()}"]
        rows.append([margin, name, *taken, *deltas, minus(f"{gain.where(takes, 0.0).min():+.4f}")])
    heads = ["margin", "rule", "clients that take it", "of those with a gain over 5 points", "Delta avg", "Delta worst"]
    return markdown([*heads, "worst client of all"], rows)


def deployment() -> str:
    """Models that clients of ProxyEnsemble deploy by each rule, and Delta."""
    frame, rows = read("do_no_harm/deployment/summary.csv"), []
    for row in frame.itertuples():
        taken = [f"{row.taken} of {row.clients}", f"{row.large_taken} of {row.large}"]
        deltas = [minus(f"{value:+.4f}") for value in (row.delta_avg, row.delta_worst, row.delta_min)]
        rows.append([f"{row.margin:g}", row.rule, *taken, *deltas, str(row.harmed)])
    heads = ["margin", "rule", "clients that take a model", "of those with a gain over 5 points", "Delta avg"]
    return markdown([*heads, "Delta worst", "worst client of all", "clients that lose the margin or more"], rows)
