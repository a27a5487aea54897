"""`make bench`: times fedekd, a bare loop and a script alternately in one run, and tells the ratios.

Machines are noisy: no time here means much by itself. What counts are ratios of times measured side by side, and
their spread over repetitions.
"""

from __future__ import annotations

import argparse

import torch

from fedekd.modules import TrainerFactory
from perf.footprint import memory, memory_of, start_up
from perf.machine import machine
from perf.setting import CalibrationTarget, make_setting
from perf.training import phases, side_by_side, whole_round
from perf.where import where_time_goes


def told(setting: CalibrationTarget) -> str:
    """What this ran on, without its name, and how."""
    device = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "no GPU used"
    return f"{machine()}; {device}; {setting.trainer.precision}, {setting.trainer.threads} thread(s); {setting.source}"


def main() -> None:
    """Run everything and print it as Markdown."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the phases and of the round (1)")
    parser.add_argument("--root", default="data", help="folder of the data files")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="batches of an epoch in the phases")
    parser.add_argument("--samples", type=int, default=7000, help="images of the whole round")
    parser.add_argument("--only", default="phases,where,round,cores,memory,startup", help="which parts, with commas")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    trainer = TrainerFactory(options.accelerator, precision=options.precision, threads=options.threads)
    setting = make_setting(trainer, options.root, options.samples)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        memory_of(setting, options.memory_of)
        return
    print(f"# make bench\n\n{told(setting)}")
    parts = options.only.split(",")
    with setting.trainer.numerics():
        if "phases" in parts:
            phases(setting, options.repetitions, options.steps)
        if "where" in parts:
            where_time_goes(setting, options.steps)
        if "round" in parts:
            whole_round(setting, max(2, options.repetitions // 2))
    if "cores" in parts and setting.device.type == "cpu":
        side_by_side(setting, max(2, options.repetitions // 2))
    if "memory" in parts:
        memory([f"--accelerator={options.accelerator}", f"--precision={options.precision}", f"--root={options.root}"])
    if "startup" in parts:
        start_up()


if __name__ == "__main__":
    main()
