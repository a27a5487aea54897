"""How long training takes: the phases of a client, a round, and clients side by side."""

from __future__ import annotations

import os
import time
from multiprocessing import get_context
from statistics import median

import torch

from benchmarks import bare, script
from benchmarks.setting import Setting, make_setting
from benchmarks.timing import NAMES, Timing, matmul_peak, print_ratios, step_flops, timed
from fedekd.federation import InProcessEngine
from fedekd.methods import Broadcast, FedeKD
from fedekd.modules import TrainerFactory


def phases(setting: Setting, repetitions: int, steps: int) -> None:
    """A client's two training phases, the three contenders in turns."""
    peak = matmul_peak(setting)
    indices = torch.cat([splits.train for splits in setting.data.clients])[: steps * setting.batch_size]
    place = indices.to(setting.device)
    method = FedeKD()
    client = setting.client(method, indices)
    proxy_state = method.upload(client, 0).state
    total = steps * setting.epochs
    print(f"\n## Phases of one client: {steps} batches of {setting.batch_size}, {setting.epochs} epochs, ms a step\n")
    print(f"Matrix products reach {peak / 1e9:.0f} GFLOP/s at this precision.\n")
    print("| phase | contender | ms a step | samples/s | share of the peak |")
    print("| --- | --- | --- | --- | --- |")
    ratios = []
    for role in ("private", "proxy"):
        networks = {r: setting.blueprint.network(r, 0) for r in ("private", "proxy")}
        by_hand, as_script = (getattr(module, f"{role}_phase") for module in (bare, script))

        def ours(role: str = role) -> None:
            if role == "private":
                method.absorb(client, proxy_state, 1)
            else:
                method.upload(client, 1)

        timing = timed(
            setting,
            {
                "bare": lambda run=by_hand, n=networks: run(setting, n["private"], n["proxy"], place),
                "fedekd": ours,
                "script": lambda run=as_script, n=networks: run(setting, n["private"], n["proxy"], indices),
            },
            repetitions,
        )
        flops = step_flops(setting, role)
        for name, seconds in timing.seconds.items():
            step = median(seconds) / total
            samples, share = setting.batch_size / step, flops / step / peak
            print(f"| {role} | {NAMES[name]} | {step * 1e3:.1f} | {samples:,.0f} | {share:.0%} |")
        ratios += [(role, timing.ratio(slow, fast), slow, fast) for slow, fast in _HELD]
    print_ratios(ratios)


_HELD = (("script", "bare"), ("fedekd", "bare"), ("script", "fedekd"))


def whole_round(setting: Setting, repetitions: int) -> None:
    """A round of FedeKD over six clients: absorb, score, upload, average."""
    method = FedeKD()
    method.start(setting.blueprint)
    engine = InProcessEngine(method, setting.data, setting.blueprint)
    clients = range(6)
    first = list(engine.visit(clients, method.broadcast(clients, 0), 0, upload=True))
    method.aggregate([visit.update for visit in first if visit.update is not None], 0)
    networks = {k: {role: setting.blueprint.network(role, k) for role in ("private", "proxy")} for k in clients}

    def ours() -> None:
        visits = list(engine.visit(clients, Broadcast(method.server_state), 1, upload=True))
        method.aggregate([visit.update for visit in visits if visit.update is not None], 1)

    def as_script() -> None:
        proxies = []
        for k, splits in enumerate(setting.data.clients):
            own = networks[k]
            own["private"] = script.private_phase(setting, own["private"], own["proxy"], splits.train)
            script.accuracy(setting, own["private"], splits.test)
            proxies.append(script.proxy_phase(setting, own["private"], own["proxy"], splits.train))
        states = [proxy.state_dict() for proxy in proxies]
        mean = {name: torch.stack([state[name].float() for state in states]).mean(dim=0) for name in states[0]}
        for own in networks.values():
            own["proxy"].load_state_dict(mean)

    timing = timed(setting, {"fedekd": ours, "script": as_script}, repetitions)
    train = sum(len(splits.train) for splits in setting.data.clients)
    print(f"\n## A round of FedeKD: six clients, {train:,} training samples, alpha 0.1\n")
    for name, seconds in timing.seconds.items():
        print(f"- {NAMES[name]}: {median(seconds):.1f} s")
    print_ratios([("round", timing.ratio("script", "fedekd"), "script", "fedekd")])


def _round_of(clients: list[int], threads: int, options: tuple[TrainerFactory, str, int], gate: object) -> None:
    """A round of some clients, in a process of its own; begins when all are ready."""
    trainer, root, samples = options
    torch.set_num_threads(threads)
    setting = make_setting(TrainerFactory(**{**vars(trainer), "threads": threads}), root, samples)
    method = FedeKD()
    method.start(setting.blueprint)
    engine = InProcessEngine(method, setting.data, setting.blueprint)
    list(engine.visit(clients, method.broadcast(clients, 0), 0, upload=True))
    gate.wait()  # type: ignore[attr-defined]
    list(engine.visit(clients, Broadcast(method.server_state), 1, upload=True))
    gate.wait()  # type: ignore[attr-defined]


def side_by_side(options: tuple[TrainerFactory, str, int], repetitions: int) -> None:
    """Six clients: one process with one thread, one with all cores, and as many processes of one thread."""
    cores = len(os.sched_getaffinity(0))
    ways = {
        "one process, 1 thread": ([list(range(6))], 1),
        f"one process, {cores} threads": ([list(range(6))], cores),
        f"{min(cores, 6)} processes, 1 thread each": (
            [list(range(6))[i :: min(cores, 6)] for i in range(min(cores, 6))],
            1,
        ),
    }
    context = get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, (groups, threads) in ways.items():
            gate = context.Barrier(len(groups) + 1)
            running = [context.Process(target=_round_of, args=(group, threads, options, gate)) for group in groups]
            for process in running:
                process.start()
            gate.wait()
            began = time.perf_counter()
            gate.wait()
            seconds[name].append(time.perf_counter() - began)
            for process in running:
                process.join()
    one, threaded, beside = ways
    print(f"\n## Six clients on {cores} cores\n")
    for name, values in seconds.items():
        print(f"- {name}: {median(values):.1f} s")
    timing = Timing(seconds)
    pairs = ((one, threaded), (threaded, beside))
    print_ratios([("round", timing.ratio(slow, fast), slow, fast) for slow, fast in pairs])
