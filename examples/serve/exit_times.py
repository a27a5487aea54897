"""Time of early exits against the full network in onnxruntime.

Run it by: python -m examples.serve.exit_times FOLDER IMAGES
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from examples.serve.model import InputError, OnnxModel


def main(argv: Sequence[str] | None = None) -> int:
    """Print milliseconds per image, of the full network and per exit."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.serve.exit_times", description="Time early exits in onnxruntime."
    )
    parser.add_argument("folder", type=Path, help="Folder of fedekd export --format onnx.")
    parser.add_argument("images", type=Path, help="Folder of images; their subfolders are read, too.")
    parser.add_argument("--runs", type=int, default=300, help="Measured images.")
    arguments = parser.parse_args(argv)
    try:
        if arguments.runs < 1:
            raise InputError(f"--runs: expected at least 1, got {arguments.runs}")
        model = OnnxModel(arguments.folder)
        paths = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not paths:
            raise InputError(f"{arguments.images}: expected PNG or JPEG images, got none")
        count = min(arguments.runs, len(paths))  # regular steps: one folder may have one class
        inputs = [model.decode_image(paths[run * len(paths) // count].read_bytes()) for run in range(count)]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    full: list[float] = []
    exits: defaultdict[int, list[float]] = defaultdict(list)
    for run in range(-10, arguments.runs):  # ten for warm-up; both alternate to cancel the load of the machine
        image = inputs[run % len(inputs)]
        start = time.perf_counter()
        model.predict(image, uses_exits=False)
        middle = time.perf_counter()
        [row] = model.predict(image)
        end = time.perf_counter()
        if run >= 0:
            full.append(1000 * (middle - start))
            exits[row["exit"]].append(1000 * (end - middle))
    print(f"full network: median {statistics.median(full):.3f} ms")
    for exit_, times in sorted(exits.items()):
        print(f"exit {exit_}: median {statistics.median(times):.3f} ms, {len(times) / len(full):.0%} of the images")
    early = sum(len(times) * statistics.median(times) for times in exits.values()) / len(full)
    print(f"with exits: {early / statistics.median(full):.0%} of the time of the full network")
    return 0


if __name__ == "__main__":
    sys.exit(main())
