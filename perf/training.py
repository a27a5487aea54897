"""Training time of a client's phases, of a round, and of parallel clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from fedekd.federation import Engine, MultiProcess, RoundRequest, Sequential, SequentialEngine, SilentObserver
from fedekd.methods import Broadcast, FedeKD
from fedekd.modules.trainer_factory import usable_cores
from perf import bare, script
from perf.setting import Workload
from perf.timing import NAMES, matmul_peak, print_ratios, step_flops, timed


def phases(setting: Workload, repetitions: int, steps: int) -> None:
    """Time the two training phases of a client for all contenders."""
    peak = matmul_peak(setting)
    indices = torch.cat([splits.train for splits in setting.data.clients])[: steps * setting.batch_size]
    on_device = indices.to(setting.device)
    method = FedeKD()
    client = setting.client(method, indices)
    proxy_state = method.prepare_update(client, 0).state
    total = -(-len(indices) // setting.batch_size) * setting.epochs
    print(f"\n## Phases of one client: {total} steps of {setting.batch_size} samples\n")
    print(f"Matrix products reach {peak / 1e9:.0f} GFLOP/s at the precision of (a) and (b); (c) is in float32.\n")
    print("| phase | contender | ms per step | samples/s | share of the peak |")
    print("| --- | --- | --- | --- | --- |")
    ratios = []
    for role in ("private", "proxy"):
        networks = {r: setting.spec.build_model(r, 0) for r in ("private", "proxy")}
        by_hand, as_script = (getattr(module, f"{role}_phase") for module in (bare, script))

        def ours(role: str = role) -> None:
            if role == "private":
                method.receive(client, proxy_state, 1)
            else:
                method.prepare_update(client, 1)

        timing = timed(
            setting,
            {
                "bare": lambda run=by_hand, n=networks: run(setting, n["private"], n["proxy"], on_device),
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
        ratios += [(role, timing.ratio(slow, fast), slow, fast) for slow, fast in _COMPARED]
    print_ratios(ratios)


_COMPARED = (("script", "bare"), ("fedekd", "bare"), ("script", "fedekd"))


def whole_round(setting: Workload, repetitions: int) -> None:
    """Time a round of FedeKD over six clients: receive, score, update, average."""
    method = FedeKD()
    method.init_server(setting.spec)
    engine = SequentialEngine(method, setting.data, setting.spec)
    clients = range(6)
    first = list(engine.run_clients(RoundRequest(clients, method.broadcast(clients, 0), 0, collect_updates=True)))
    method.aggregate([visit.update for visit in first if visit.update is not None], 0)
    networks = {k: {role: setting.spec.build_model(role, k) for role in ("private", "proxy")} for k in clients}

    def ours() -> None:
        visits = list(
            engine.run_clients(RoundRequest(clients, Broadcast(method.server_state), 1, collect_updates=True))
        )
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


def parallel_clients(setting: Workload, repetitions: int) -> None:
    """Time six clients in one process (one thread, all cores) and in parallel."""
    cores = usable_cores()
    many = min(cores, 6)
    one, threaded, parallel = (
        "one process, 1 thread",
        f"one process, {cores} threads",
        f"{many} processes, 1 thread each",
    )
    engines: dict[str, Engine] = {}
    contenders: dict[str, Callable[[], None]] = {}
    for name, threads, placement in (
        (one, 1, Sequential()),
        (threaded, cores, Sequential()),
        (parallel, 1, MultiProcess(many)),
    ):
        trainer = replace(setting.trainer, threads=threads)
        method = FedeKD()
        method.init_server(setting.spec)
        spec = replace(setting.spec, trainer=trainer)
        engine = engines[name] = placement(method, setting.data, spec, None, SilentObserver())
        contenders[name] = partial(_visit, engine, Broadcast(method.server_state))
    timing = timed(setting, contenders, repetitions)
    for engine in engines.values():
        engine.close()
    print(f"\n## Six clients on {cores} cores\n")
    for name, values in timing.seconds.items():
        print(f"- {name}: {median(values):.1f} s")
    pairs = ((one, threaded), (threaded, parallel))
    print_ratios([("round", timing.ratio(slow, fast), slow, fast) for slow, fast in pairs])


def _visit(engine: Engine, broadcast: Broadcast) -> None:
    for _ in engine.run_clients(RoundRequest(range(6), broadcast, 0, collect_updates=True)):
        pass
    for _ in engine.run_clients(RoundRequest(range(6), _nudged(broadcast), 1, collect_updates=False)):
        pass


def _nudged(broadcast: Broadcast) -> Broadcast:
    """Return a proxy that differs from the initial one, which FedeKD skips."""
    return Broadcast({name: tensor + 1e-3 for name, tensor in broadcast.shared.items()})
