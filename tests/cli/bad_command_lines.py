"""Seeded mutators of valid command lines.

`BAD_COMMAND_LINES=500 BAD_SEED=1 pytest -s tests/cli/test_bad_command_lines.py` runs the full count with another seed
and prints its figures; without the variables it runs `SHORT` of them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from fedekd.cli.benchmark import benchmark_parser
from fedekd.cli.calibrate import calibrate_parser
from fedekd.cli.monitor import monitor_parser
from fedekd.cli.predict import predict_parser
from fedekd.cli.report import report_parser
from fedekd.configuration.options import federation_parser

#: Command lines of the short version, in `make test`.
SHORT = 60

COUNT = int(os.environ.get("BAD_COMMAND_LINES", SHORT))
SEED = int(os.environ.get("BAD_SEED", 0))

PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "fit": cache(federation_parser),
    "calibrate": cache(calibrate_parser),
    "predict": cache(predict_parser),
    "monitor": cache(monitor_parser),
    "report": cache(report_parser),
    "benchmark": cache(benchmark_parser),
}

#: A working folder has the data set blobs.npz, the finished run `a` of three clients, and the files below.
FIT_YAML = """\
rounds: 1
quiet: true
data: {dataset: blobs.npz, num_clients: 3, alpha: 1.0, batch_size: 16, download: false}
client: {local_epochs: 1}
trainer: {accelerator: cpu, threads: 1}
"""
GRID_YAML = """\
output: grid
blocks:
  - {datasets: [blobs.npz], alphas: [1.0], seeds: [0], methods: {A: {class_path: FedAvg}}, config: fit.yaml}
"""
#: Arrivals of which none has come.
ARRIVALS = "sample,model,policy,exit,confidence,disagreement\n"
VALID = {
    "fit": ("fit", "--config=fit.yaml", "--output=new"),
    "test": ("test", "a"),
    "calibrate": ("calibrate", "a"),
    "predict": ("predict", "a", "--input=blobs.npz", "--client=0"),
    "monitor": ("monitor", "a", "--arrivals=arrivals.csv", "--client=0"),
    "benchmark": ("benchmark", "--config=grid.yaml"),
    "report": ("report", "a", "--exits=false"),
}

LONG = "x" * 10_000
ODD = (
    "five",
    "nan",
    "[1",
    "{a: 1}",
    "\x1b[31mred",
    "drei Äpfel 💥",
    LONG,
    "\udcff",
    "a\nb\nc\nd",
    "%s {0} {key}",
    "None",
)
ODD_NUMBERS = ("", "1:30", "true", "inf", "-.inf", "1e400", "9" * 5001, "[1, 2]", "0o10", "1,5", "--1")
WRONG: dict[str, tuple[str, ...]] = {
    "int": (*ODD, *ODD_NUMBERS, "1.5", "1e3", "9" * 30, f"-{'9' * 20}"),
    "float": (*ODD, *ODD_NUMBERS),
    "bool": (*ODD, "", "2", "1.0", "[true]"),
    "tuple": (*ODD, "", "1", "[1]", "[1, 2, x]", "[.nan, 1, 1]", "[[1], 2, 3]", "[1, 2, 3, 4]"),
    "choice": (*ODD, "", "1", "[cpu]", "null"),
    "class": (
        *(
            "",
            "3",
            "[1]",
            "1.5",
            "Nope",
            "nope.Nope",
            "os.path.join",
            "fedekd.nope",
            ".",
            "a..b",
            LONG,
            "\x1b[31m",
            "builtins.int",
        ),
        *("{class_path: 3}", "{class_path: Nope}", "{class_path: null}", "{nope: 1}", "[[[[1]]]]", "{class_path: [1]}"),
    ),
}
#: Values of the right type that no run has.
OUT_OF_RANGE: dict[str, Mapping[str, tuple[str, ...]]] = {
    "fit": {
        "rounds": ("0", "-1", "1000001", "9223372036854775807"),
        "participation": ("0", "-1", "1.01"),
        "update_loss_rate": ("1", "-0.1"),
        "quorum": ("0", "99", "2147483648"),
        "checkpoint_every": ("-1", "inf", "nan"),
        "max_update_norm": ("0", "-1"),
        "task": ("regresion", "", "1", LONG),
        "resume": ("nowhere", "", "blobs.npz", LONG, "\x1b[31m"),
        "output": ("", "a", "blobs.npz", "blobs.npz/x", "a\0b", LONG),
        "baseline_dir": ("blobs.npz",),
        "data.dataset": ("", "nowhere", "nowhere.npz", "fit.yaml", "digitss", LONG, "a", "fit.npz"),
        "data.partition": ("lable", "", "os.path.join", "nope.nope", "a.b.c", LONG, "fedekd.nope"),
        "data.num_clients": ("0", "-1", "1000", "2147483648", "9223372036854775807"),
        "data.alpha": ("0", "-1"),
        "data.batch_size": ("0", "-1"),
        "data.eval_batch_size": ("0", "-1"),
        "data.min_samples": ("-1", "1000", "9223372036854775807"),
        "data.num_classes": ("0", "-1", "1"),
        "data.fractions": ("[0,0,0]", "[-1,1,1]", "[2,1,1]"),
        "client.local_epochs": ("0", "-1"),
        "client.exits": ("0", "-1", "9", "[]", "[0]", "9223372036854775807"),
        "client.exit_grid": ("0", "-1", "1000", "2147483648"),
        "client.lr_decay": ("0", "-1", "1.5"),
        "client.depths": ("0", "[]", "[1, -1]", "1"),
        "client.private_models": ("[]", "[Nope]", "[3]", "[{class_path: Nope}]", "[[1]]"),
        "client.private_model": ("torch.nn.Linear", "torchvision.models.nope", "PrivatCNN", "json.dumps"),
        "client.optimizer": ("torch.nn.Linear", "LBFGS", "SparseAdam", "Muon", "Adm"),
        "client.optimizer.lr": ("-1", "-1e-9"),
        "client.optimizer.betas": ("[2, 0.9]", "[-1, 0.9]", "[0.9]"),
        "client.optimizer.eps": ("-1",),
        "client.optimizer.weight_decay": ("-1",),
        "client.optimizer.differentiable": ("true",),
        "client.optimizer.capturable": ("true",),
        "trainer.device": ("-1",),
        "trainer.threads": ("0", "-1", "2147483648", "9223372036854775807"),
        "trainer.accelerator": ("gpu", "tpu"),
        "trainer.precision": ("16-mixed", "bf16"),
        "method": ("torch.nn.Linear", "ProxyMethod", "fedekd.methods.Method", "SAFEKD2"),
        "method.temperature": ("0", "-1"),
        "method.beta": ("-1",),
        "method.gate": ("open", "1"),
        "method.energy": ("kll", "", "nope.E"),
        "engine": ("SideByside", "InProcess", "torch.nn.Linear"),
        "do_no_harm.confidence": ("0", "1", "-1"),
        "do_no_harm.rule": ("beter",),
        "do_no_harm.looks": ("0", "99"),
        "do_no_harm.candidates": ("proxy", "[unknown]", "[private, private]", "[1]"),
        "do_no_harm.metric": ("f1",),
        "do_no_harm.unit": ("patient",),
        "do_no_harm.delta": ("0.1",),
        "logger": ("Nope", "torch.nn.Linear", "[Nope]", "[3]"),
    },
    "calibrate": {
        "target_risk": ("0", "1", "-1", "2"),
        "confidence": ("0", "1", "-1"),
        "mode": ("lt", "path", "released", "plug_in", "", LONG),
        "score": ("margn", "", LONG),
        "gamma": ("-1",),
        "groups": ("nope", "", LONG),
        "shared_thresholds": ("true",),
        "client": ("-1", "3", "9223372036854775807"),
        "input": ("nowhere.npz", "", "fit.yaml", "a", LONG),
        "site": ("nowhere", "a", LONG),
    },
    "predict": {
        "client": ("-1", "3", "9223372036854775807"),
        "input": ("nowhere.npz", "", "fit.yaml", "a", LONG),
        "output": ("", "a", "x.txt", "nowhere/x.csv", LONG),
        "site": ("nowhere", "a", LONG),
        "probabilities": ("5", "maybe"),
        "members": ("true", "maybe"),
        "monitoring": ("maybe", "5"),
        "label_prior": ("unifrom", "", "0.5", "[0.5, 0.5", "[2, -1]", "[.nan]", "[1]", "[[1]]", "[null]", LONG),
    },
    "monitor": {
        "client": ("-1", "3", "9223372036854775807"),
        "arrivals": ("nowhere.csv", "", "fit.yaml", "blobs.npz", "a", LONG),
        "confidence": ("0", "1", "-1", "2"),
        "coverage": ("0", "1", "nan"),
        "state": ("blobs.npz", "", LONG),
        "apply": ("5", "maybe"),
        "site": ("nowhere", "a", LONG),
    },
    "report": {"output": ("blobs.npz",), "wandb": ("true", "maybe")},
    "benchmark": {
        "processes": ("0", "-1"),
        "threads": ("0", "-1", "", "x", "1.5", LONG),
        "accelerator": ("gpu", "", LONG),
        "precision": ("bf15", "", "16-mixed"),
        "filter": ("alpha", "aplha=1", "alpha=7", "dataset=x", LONG, "=", "seed=nan"),
        "output": ("blobs.npz",),
        "results": ("blobs.npz",),
        "blocks": ("1", "[1]", "[null]", "[[1]]", "[]", "{}", "[{datasets: 3}]", "[{nope: 1}]", "x", LONG),
    },
}
#: Files that are no configuration, nor a grid.
NO_CONFIGURATION: dict[str, bytes] = {
    "empty": b"",
    "comment": b"# nothing\n",
    "binary": bytes(range(256)),
    "utf-16": "rounds: 1\n".encode("utf-16"),
    "latin-1": "data: {dataset: é}\n".encode("latin-1"),
    "control": b"rounds: \x01\n",
    "scalar": b"3\n",
    "list": b"- rounds\n- 1\n",
    "twice": b"output: x\noutput: y\n",
    "twice within": b"data:\n  alpha: 1\n  alpha: 1\n",
    "deep": b"output: " + b"[" * 500 + b"]" * 500 + b"\n",
    "deep block": b"".join(b" " * depth + b"a:\n" for depth in range(500)),
    "open brackets": b"[" * 100_000,
    "tag": b"output: !!python/object/apply:os.system [exit 1]\n",
    "own tag": b"output: !nope x\n",
    "no key": b"3: 1\n",
    "list as key": b"? [a]\n: 1\n",
    "alias": b"output: *nope\n",
    "own alias": b"a: &a [*a]\n",
    "bomb": b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 10)) for c in b"bcdefgh"),
    "two documents": b"output: x\n---\noutput: y\n",
    "tabs": b"\toutput: x\n",
    "colons": b"output: a: b\n",
    "open": b"output: [\n",
    "version": b"%YAML 3.0\n---\noutput: x\n",
    "unknown": b"nope: 1\n",
    "unknown with a long name": b"x" * 5000 + b": 1\n",
    "itself": b"config: bad.yaml\n",
    "missing": b"config: nowhere.yaml\n",
    "number of a file": b"config: 5\n",
    "equals": b"output: =\n",
    "merge": b"<<: 3\n",
}
GRID_FIELDS: dict[str, tuple[str, ...]] = {
    "datasets": ("3", "[]", "null", "[3]", "{a: 1}", "[[a]]"),
    "alphas": ("[]", "[0]", "[-1]", "[.inf]", "[x]", "x", "null"),
    "seeds": ("[]", "[1.5]", "[x]", "[99999999999999999999]", "null", "{}"),
    "methods": (
        "[]",
        "3",
        "{A: 3}",
        "{A: Nope}",
        "{A: {class_path: Nope}}",
        "{A: null}",
        "{}",
        "{A: [1]}",
    ),
    "options": (
        "3",
        "[1]",
        "{rounds: x}",
        "{rounds: 0}",
        "{nope: 1}",
        "{client.optimizer.lr: -1}",
        "{config: nowhere}",
    ),
    "config": ("nowhere.yaml", "3", "[1]", "null", "''", "a", "bad.yaml"),
    "coverage": ("3", "[1]", "{modes: 3}", "{modes: [path]}", "{draws: 0}", "{nope: 1}", "{target_risks: []}"),
    "nope": ("1",),
}
RUN_FOLDERS = (
    "nowhere",
    "blobs.npz",
    ".",
    "",
    "a/config.yaml",
    LONG,
    "\x1b[31m",
    "\udcff",
    "a\0b",
    "empty",
    "broken",
    "unfinished",
)


@dataclass(frozen=True)
class CommandLine:
    """A command line and the files that it reads."""

    argv: tuple[str, ...]
    kind: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    is_invalid: bool = True

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def types_of(typehint: Any) -> set[str]:
    """The kinds of values of an option, as keys of `WRONG`."""
    if get_origin(typehint) is Literal:
        return {"choice"}
    if get_origin(typehint) is tuple:
        return {"tuple"}
    if isinstance(typehint, type) and get_origin(typehint) is None:
        return {typehint.__name__ if typehint in (int, float, bool, str, NoneType) else "class"}
    return set().union(*(types_of(each) for each in get_args(typehint))) or {"any"}


def typed_options(command: str) -> dict[str, tuple[str, ...]]:
    """Options of a command with values of wrong types."""
    options = {}
    for action in PARSERS[command]()._actions:
        if action.option_strings and (typehint := getattr(action, "_typehint", None)) is not None:
            kinds = types_of(typehint) - {"NoneType"}
            if len(kinds) == 1 and kinds <= WRONG.keys() and not action.dest.endswith("help"):
                options[action.dest] = WRONG[kinds.pop()]
    return options


def option(draw: random.Random, name: str, value: str) -> tuple[str, ...]:
    return (f"--{name}={value}",) if draw.random() < 0.6 else (f"--{name}", value)


def in_file(name: str, value: str) -> bytes:
    """A configuration with one key, whose value is a quoted text."""
    content: Any = value
    for part in reversed(name.split(".")):
        content = {part: content}
    return json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape")


def set_option(draw: random.Random, command: str, name: str, value: str, kind: str) -> CommandLine:
    if command == "fit" and name not in ("resume",) and draw.random() < 0.3:
        return CommandLine(
            (*VALID[command], "--config=bad.yaml"), f"{kind} in a file", {"bad.yaml": in_file(name, value)}
        )
    return CommandLine((*VALID[command], *option(draw, name, value)), kind)


def wrong_type(draw: random.Random) -> CommandLine:
    command = draw.choice([command for command in sorted(PARSERS) if typed_options(command)])
    name, values = draw.choice(sorted(typed_options(command).items()))
    return set_option(draw, command, name, draw.choice(values), "wrong type")


def out_of_range(draw: random.Random) -> CommandLine:
    command = draw.choice(("fit", "fit", "fit", *OUT_OF_RANGE))
    name, values = draw.choice(sorted(OUT_OF_RANGE[command].items()))
    return set_option(draw, command, name, draw.choice(values), "out of range")


def unknown_option(draw: random.Random) -> CommandLine:
    command = draw.choice(sorted(VALID))
    known = [action.dest for action in PARSERS[command]()._actions] if command in PARSERS else ["run"]
    name = draw.choice(known)
    position = draw.randrange(len(name))
    typo = draw.choice(
        (name[:position] + "_" + name[position:], name + "s", f"{name}.nope", name.upper(), LONG, "\x1b[31m", "ü", "")
    )
    if typo in known or not typo:
        typo = "nope"
    return CommandLine((*VALID[command], draw.choice((f"--{typo}=1", f"--{typo}"))), "unknown option")


def unknown_argument(draw: random.Random) -> CommandLine:
    part = draw.choice(
        ("method", "engine", "client.optimizer", "client.private_model", "do_no_harm", "client", "data", "trainer")
    )
    name = draw.choice(
        ("nope", "init_args", "init_args.nope", "class_path.nope", LONG, "in_channels", "betta", "params")
    )
    return set_option(
        draw, "fit", f"{part}.{name}", draw.choice(("3", "[1]", "text", "", "\x1b[31m")), "unknown argument"
    )


#: Options whose value may be left out.
FLAGS = ("quiet", "familywise", "probabilities", "members", "monitoring", "apply", "shared_thresholds")


def missing_value(draw: random.Random) -> CommandLine:
    command = draw.choice([command for command in sorted(PARSERS) if typed_options(command)])
    names = [name for name in typed_options(command) if name not in FLAGS]
    return CommandLine((*VALID[command], f"--{draw.choice(names)}"), "missing value")


def wrong_file(draw: random.Random) -> CommandLine:
    command = draw.choice(("fit", "benchmark"))
    name, content = draw.choice(sorted(NO_CONFIGURATION.items()))
    if name in ("twice within", "unknown") and command == "benchmark":
        content += b"blocks: 3\n"
    argv = ("fit", "--output=new") if command == "fit" else ("benchmark",)
    return CommandLine((*argv, *option(draw, "config", "bad.yaml")), f"file: {name}", {"bad.yaml": content})


def no_file(draw: random.Random) -> CommandLine:
    command = draw.choice(("fit", "benchmark"))
    name = draw.choice(
        (
            "nowhere.yaml",
            "a",
            "/dev/null",
            "/dev/zero",
            "",
            LONG,
            "\x1b[31m",
            "a\0b",
            "\udcff",
            "digit.yaml",
            "blobs.npz",
        )
    )
    return CommandLine((command, *option(draw, "config", name)), "no file")


def wrong_grid(draw: random.Random) -> CommandLine:
    fields = {
        "datasets": "[blobs.npz]",
        "alphas": "[1.0]",
        "seeds": "[0]",
        "methods": "{A: FedAvg}",
        "config": "fit.yaml",
    }
    name, values = draw.choice(sorted(GRID_FIELDS.items()))
    if draw.random() < 0.2 and name in fields and name != "config":
        del fields[name]
    else:
        fields[name] = draw.choice(values)
    block = ", ".join(f"{key}: {value}" for key, value in fields.items())
    return CommandLine(
        ("benchmark", "--config=bad.yaml"), f"grid: {name}", {"bad.yaml": f"blocks: [{{{block}}}]\n".encode()}
    )


def wrong_run(draw: random.Random) -> CommandLine:
    command = draw.choice(("test", "calibrate", "predict", "report", "fit"))
    folder = draw.choice(RUN_FOLDERS)
    if command == "report" and folder == ".":
        folder = "empty"  # the working folder has a finished run
    files = {
        "empty/x": b"",
        "broken/config.yaml": b"\xff",
        "broken/summary.json": b"{",
        "unfinished/config.yaml": FIT_YAML.encode(),
    }
    if command == "fit":
        folder = "nowhere" if folder == "unfinished" else folder
        return CommandLine(("fit", *option(draw, "resume", folder)), "wrong run", files)
    return CommandLine((command, folder, *VALID[command][2:]), "wrong run", files)


def wrong_combination(draw: random.Random) -> CommandLine:
    argv = draw.choice(
        (
            ("fit", "--resume=a", "--output=b"),
            ("fit", "--resume=a", "--seed=7"),
            ("fit", "--resume=a", "--method=Local"),
            ("fit", "--resume=a", "--config=fit.yaml"),
            ("fit", "--config=fit.yaml", "--client.depths=[1]"),
            ("fit", "--config=fit.yaml", "--method=SafeKD", "--task=regression"),
            ("fit", "--config=fit.yaml", "--method=Local", "--do_no_harm=true"),
            ("fit", "--config=fit.yaml", "--quorum=3", "--participation=0.3"),
            ("fit", "--config=fit.yaml", "--engine=Sequential", "--engine.processes=3"),
            ("fit", "--config=fit.yaml", "--engine=Sequential", "--engine.cache=-1"),
            ("fit", "--config=fit.yaml", "--client.optimizer=SGD", "--client.optimizer.nesterov=true"),
            ("fit", "--config=fit.yaml", "--client.optimizer=SGD", "--client.optimizer.momentum=-1"),
            ("fit", "--config=fit.yaml", "--client.optimizer=SGD", "--client.optimizer.betas=[0.9, 0.9]"),
            ("fit", "--config=fit.yaml", "--rounds=2", "--rounds=x"),
            ("fit", "--config=fit.yaml", "--output=new", "--output=a"),
            ("fit",),
            ("fit", "a"),
            ("fit", "--config=fit.yaml", "--", "--rounds=1"),
            ("fit", "--data.dataset"),
            ("calibrate", "a", "--familywise", "--client=0"),
            ("calibrate", "a", "--groups=true_class", "--mode=ltt_joint"),
            ("predict", "a", "--input=blobs.npz", "--client=0", "--group=A"),
            ("calibrate", "a", "b"),
            ("calibrate",),
            ("predict", "a"),
            ("monitor",),
            ("monitor", "a"),
            ("monitor", "--arrivals=blobs.npz"),
            ("predict", "a", "--input=blobs.npz", "--client=0", "--monitoring", "--label_prior=uniform"),
            ("predict", "--input=blobs.npz"),
            ("predict", "a", "--input=blobs.npz"),
            ("report",),
            ("report", "a", "nowhere"),
            ("report", "a", "--exits=true"),
            ("report", "a", "--exits=true", "--client=99"),
            ("test",),
            ("test", "a", "a"),
            ("test", "--site=a"),
            ("predict", "--site=" + LONG, "--input=blobs.npz"),
            ("benchmark",),
            ("benchmark", "--run=false"),
            ("benchmark", "--config=fit.yaml"),
            ("fit", "--config=grid.yaml"),
        )
    )
    return CommandLine(argv, "combination")


def no_command(draw: random.Random) -> CommandLine:
    name = draw.choice(
        (
            "fitt",
            "",
            LONG,
            "\x1b[31m",
            "\udcff",
            "--rounds=1",
            "-x",
            "FIT",
            "fit ",
            "a\nb",
            "résumé",
            "--verson",
            "None",
            "{0}",
        )
    )
    return CommandLine((name, *draw.choice(((), ("--config=fit.yaml",), (LONG,)))), "no command")


def unusual(draw: random.Random) -> CommandLine:
    """Command lines that may be valid: only tracebacks and the length of messages count."""
    command = draw.choice(sorted(VALID))
    extra = draw.choice(
        (
            *(
                ("--help",),
                ("--seed=-5",),
                ("--seed=9223372036854775807",),
                ("--rounds=1", "--rounds=2"),
                ("--rounds=010",),
            ),
            *(
                ("--quiet=yes",),
                ("--client=null",),
                ("--client.optimizer.lr=1_0e-3",),
                ("--method={}",),
                ("--output=ü 💥",),
            ),
            *(
                ("--data.batch_size=9223372036854775807",),
                ("--data.eval_batch_size=2147483648",),
                ("--client.exit_grid=2147483648",),
            ),
            *(
                ("--client.local_epochs=9223372036854775807",),
                ("--draws=9223372036854775807",),
                ("--method.init_args=null",),
            ),
            *(
                ("--engine=MultiProcess", "--engine.processes=2147483648"),
                ("--data.fractions=[1e308,1,1]",),
                ("--data.alpha=1e308",),
            ),
            *(
                ("--data.alpha=5e-324",),
                ("--client.optimizer.lr=1e308",),
                ("--method.temperature=5e-324",),
                ("--max_update_norm=1e-300",),
            ),
            *(
                ("--data=fit.yaml",),
                ("--client=fit.yaml",),
                ("--trainer=nowhere.yaml",),
                ("--method=fit.yaml",),
                ("--print_config",),
            ),
            *(
                ("--method.help=FedeKD",),
                ("--method.help=Nope",),
                ("--engine.help",),
                ("--client.private_model.help=3",),
            ),
            *(
                ("--data.num_classes=2147483648",),
                ("--data.root=blobs.npz",),
                ("--data.root=",),
                ("--client.depths+=1",),
            ),
        )
    )
    return CommandLine((*VALID[command], *extra), "unusual", is_invalid=False)


MUTATORS: tuple[tuple[Callable[[random.Random], CommandLine], int], ...] = (
    (wrong_type, 8),
    (out_of_range, 10),
    (unknown_option, 3),
    (unknown_argument, 4),
    (missing_value, 2),
    (wrong_file, 6),
    (no_file, 2),
    (wrong_grid, 5),
    (wrong_run, 4),
    (wrong_combination, 3),
    (no_command, 2),
    (unusual, 4),
)


def command_lines(count: int, seed: int) -> list[CommandLine]:
    """Draw command lines, one mutator at a time and sometimes two of them at once."""
    draw = random.Random(seed)
    mutators, weights = zip(*MUTATORS, strict=True)
    lines = []
    while len(lines) < count:
        [mutate] = draw.choices(mutators, weights)
        line = mutate(draw)
        if line.is_invalid and draw.random() < 0.1 and line.argv[:1] == ("fit",):
            line = replace(line, argv=(*line.argv, f"--seed={draw.randrange(9)}"))
        lines.append(line)
    return lines
