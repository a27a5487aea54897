"""Compare the speed of fedekd, a bare loop and a script: `make bench`.

The contenders run alternately, because times on a shared machine vary. The results are ratios of times of the same
repetition, and their spread over repetitions.
"""

from __future__ import annotations

import argparse

import torch

from fedekd.modules import TrainerFactory
from perf.footprint import memory, memory_of, start_up
from perf.machine import machine
from perf.setting import Workload, make_setting
from perf.stacked import stacked_clients
from perf.training import parallel_clients, phases, whole_round
from perf.where import where_time_goes


def description(setting: Workload) -> str:
    """Return the device, precision, threads and data as text."""
    device = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "no GPU used"
    return f"{machine()}; {device}; {setting.trainer.precision}, {setting.trainer.threads} thread(s); {setting.source}"


def main() -> None:
    """Run the selected parts and print them as Markdown."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--precision", default="auto")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads of the phases and of the round (default: %(default)s)"
    )
    parser.add_argument("--root", default="data", help="folder of the data files (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="batches per epoch in the phases (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=7000, help="images of the whole round (default: %(default)s)")
    parser.add_argument(
        "--only",
        default="phases,where,round,cores,stacked,memory,startup",
        help="parts to run, separated by commas (default: all)",
    )
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    trainer = TrainerFactory(options.accelerator, precision=options.precision, threads=options.threads)
    setting = make_setting(trainer, options.root, options.samples)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        memory_of(setting, options.memory_of)
        return
    print(f"# make bench\n\n{description(setting)}")
    parts = options.only.split(",")
    with setting.trainer.numerics():
        if "phases" in parts:
            phases(setting, options.repetitions, options.steps)
        if "where" in parts:
            where_time_goes(setting, options.steps)
        if "round" in parts:
            whole_round(setting, max(2, options.repetitions // 2))
        if "stacked" in parts and setting.device.type == "cpu":
            stacked_clients(setting, options.repetitions)
    if "cores" in parts and setting.device.type == "cpu":
        parallel_clients(setting, max(2, options.repetitions // 2))
    if "memory" in parts:
        memory([f"--accelerator={options.accelerator}", f"--precision={options.precision}", f"--root={options.root}"])
    if "startup" in parts:
        start_up()


if __name__ == "__main__":
    main()
