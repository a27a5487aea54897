"""One-line versions of jsonargparse's errors, which have up to ten lines."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from importlib import import_module

from jsonargparse import ArgumentParser

from fedekd.errors import listed, nearest, shorten

#: Former names and what replaces them. A row applies where the replacement is an option of the command.
RENAMED = {
    "alpha": "target_risk",
    "delta": "confidence",
    "simultaneous": "familywise",
    "reference_dir": "baseline_dir",
    "dropout": "update_loss_rate",
    "do_no_harm.delta": "do_no_harm.confidence",
    "do_no_harm.keep": "do_no_harm.rule",
    "InProcess": "Sequential",
    "SideBySide": "MultiProcess",
}

#: Those whose value changed, too: a failure probability became a confidence.
_COMPLEMENTS = {"delta", "do_no_harm.delta"}

#: Arguments that are filled in, and by what.
_FILLED_IN = {**dict.fromkeys(("in_channels", "image_size", "num_classes"), "data"), "params": "model"}

#: Characters of a part of jsonargparse's text that is repeated in an error.
_LONGEST_PART = 160

_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "tuple": "a list, as in [0.6,0.2,0.2]",
    "list": "a list",
    "collections.abc.Sequence": "a list",
    "dict": "keys and values",
    "torch.Tensor": "",  # cannot be written in a configuration
}


def explain(text: str, parser: ArgumentParser) -> str:
    """Return an error of jsonargparse in one line.

    Args:
        text: The text of the error. Texts that no pattern matches are shortened to their first part.
        parser: The parser that raised it; similar names are searched among its options.
    """
    for pattern, describe in _PATTERNS:
        if match := re.search(pattern, text):
            if callable(describe):
                return describe(match, parser)
            groups = (shorten(" ".join(group.split()), _LONGEST_PART) for group in match.groups(default=""))
            value = " ".join((re.findall(r"(?:Given|Got) value: ([^\n]*)", text) or [""])[-1].split())
            return describe.format(*groups, key=_key(match), value=shorten(value))
    keys = ".".join(re.findall(r'Parser key "([^"]+)":', text))
    reason = " ".join(text.rpartition('":')[2].split("Given value type:")[0].split())
    return f"--{keys}: {reason}" if keys else reason


def _new_name(old: str, known: Collection[str], prefix: str = "") -> str | None:
    """Return what replaces a former name, or None if nothing in `known` does."""
    new = RENAMED.get(old)
    if new is None or new not in known:
        return None
    return f"renamed to {prefix}{new}{' (1 - delta)' if old in _COMPLEMENTS else ''}"


def _key(match: re.Match[str]) -> str:
    """Return the dotted key that the matched part of an error is about."""
    return ".".join(re.findall(r'Parser key "([^"]+)"', match.string[: match.end()]))


def _unknown_option(match: re.Match[str], parser: ArgumentParser) -> str:
    name = ".".join(match.groups()).split("=")[0].lstrip("-")
    options = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    if message := _new_name(name, options, "--"):
        return f"--{name}: {message}"
    group = name.rpartition(".")[0]
    siblings = [option for option in options if group and option.startswith(f"{group}.")]
    hint = nearest(name, siblings or options)
    if not siblings and not hint.startswith("Did"):
        hint = "--help lists the options."  # all of them would be a line of a thousand characters
    return f"--{shorten(name)}: unknown option. {hint.replace(chr(39), '--', 1).replace(chr(39), '')}"


def _unknown_argument(match: re.Match[str], parser: ArgumentParser) -> str:
    class_path, name = match.groups()
    parameters = inspect.signature(_import(class_path)).parameters
    key = f"{_key(match)}.{name}"
    if name in _FILLED_IN:
        return f"--{key}: cannot be set, its value follows from the {_FILLED_IN[name]}"
    group = key.partition(".")[0]
    if message := _new_name(key, {f"{group}.{parameter}" for parameter in parameters}, "--"):
        return f"--{key}: {message}"
    known = [item for item, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    hint = nearest(name, known) if parameters else "It takes no arguments."
    if len(known) < len(parameters) and not hint.startswith("Did"):
        hint = "An argument that its signature does not name belongs in dict_kwargs."
    return f"--{shorten(key)}: unknown argument of {class_path}. {hint}"


def _unknown_class(match: re.Match[str], parser: ArgumentParser) -> str:
    name, bases = match[1], _bases(match)
    hint = "Give a class path, as in package.module.Class."
    if bases:
        known = set(subclass_names(_import(bases[-1])))
        if message := _new_name(name.rpartition(".")[2], known):
            return f"--{_key(match)} {shorten(name)}: {message}"
        suggestion = nearest(name, known)
        # torch.nn.Module has hundreds of subclasses: no list of them all.
        hint = suggestion if suggestion.startswith("Did") or len(known) < 20 else hint
    return f"--{_key(match)}: expected the name of a class, got {shorten(repr(name))}. {hint}"


def _invalid_class(match: re.Match[str], parser: ArgumentParser) -> str:
    class_path, reason = match.groups()
    known = {name for base in _bases(match) for name in subclass_names(_import(base))}
    reason = _new_name(class_path.rpartition(".")[2], known) or " ".join(reason.split())
    return f"--{_key(match)} {shorten(class_path)}: {shorten(reason, _LONGEST_PART)}"


def _abstract_class(match: re.Match[str], parser: ArgumentParser) -> str:
    known = subclass_names(_import(_bases(match)[-1]))
    return (
        f"--{_key(match)}: expected a class with an implementation, got an abstract one. Choose from: {listed(known)}."
    )


def _wrong_type(match: re.Match[str], parser: ArgumentParser) -> str:
    types, value = match[1], match[2].strip()
    single = [] if types.startswith("tuple with") else re.findall(_TYPE, types)
    names = [_type_name(expected, value) for expected in single or [types]]
    return f"--{_key(match)}: expected {' or '.join(filter(None, names))}, got {shorten(repr(value))}"


_TYPE = r"<class '[^']+'>|collections\.abc\.Sequence|typing\.Literal\[[^\]]*\]"


def _type_name(expected: str, value: str) -> str:
    """Return a type in plain words; empty if no option can have its values."""
    name = re.sub(r"<class '([^']+)'>", r"\1", expected)
    if name == "float" and value.lower().strip("+-.") in ("nan", "inf", "infinity"):
        return "a finite number"
    if elements := re.fullmatch(r"tuple with (\d+) elements", name):
        return f"a list of {elements[1]} values"
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", name):
        return f"one of {choices[1]}" if "," in choices[1] else choices[1]
    return _TYPE_NAMES.get(name, name)


def _bases(match: re.Match[str]) -> list[str]:
    return re.findall(r"Subtypes: \[?<class '(\w+\.[^']+)'>", match.string[: match.end()])


def _import(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def subclass_names(base: type) -> list[str]:
    """Return the names of the public subclasses that have an implementation, sorted.

    Args:
        base: A class; subclasses that are not imported are left out.
    """
    return sorted({subclass.__name__ for subclass in _subclasses(base)})


def _subclasses(base: type) -> Iterator[type]:
    subclass: type
    for subclass in base.__subclasses__():
        if not inspect.isabstract(subclass) and not subclass.__name__.startswith("_"):
            yield subclass
        yield from _subclasses(subclass)


#: Patterns of jsonargparse 4.53, most specific first, and the line for each: a template or a function.
_PATTERNS: list[tuple[str, str | Callable[[re.Match[str], ArgumentParser], str]]] = [
    (
        r'(?s)^Parser key "do_no_harm":.*import path.*Given value: (.*)',
        "--do_no_harm: expected true, false or arguments such as --do_no_harm.confidence 0.9, got {0!r}",
    ),
    (
        r'(?s)^Parser key "privacy":.*import path.*Given value: (.*)',
        "--privacy: expected null or arguments such as --privacy.noise_multiplier 1.0, got {0!r}",
    ),
    (
        r'(?s)^Parser key "client.scheduler":.*avoid ambiguity: torch\.optim\.lr_scheduler\.(ReduceLROnPlateau)',
        "--client.scheduler: expected a scheduler that needs no metric, got {0!r}",
    ),
    (
        r'(?s)^Parser key "client.scheduler":.*?Parser key "(lr_lambda|scale_fn)":.*?Given value: ([^\n]*)',
        "--client.scheduler.{0}: expected the import path of a function, got {1!r}",
    ),
    (r"unrecognized arguments: ([^-]\S*)", "{0!r}: unexpected argument; options begin with --"),
    (r"unrecognized arguments: (\S+)", _unknown_option),
    (r"^Option '([^']+)' is not accepted", _unknown_option),
    (r"Group '([^']+)' does not accept option '([^']+)'", _unknown_option),
    (r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted", _unknown_argument),
    (
        r"Problem with given class_path '[^']+':\s+'(\w+)' object has no attribute 'keys'",
        "--{key}.init_args: expected keys and values, got one value of type {0}",
    ),
    (r"Problem with given class_path '([^']+)':\s+(?!\s|Parser key)([^\n]+)", _invalid_class),
    (r"Expected an instantiatable class, but(?: \S+)? is abstract", _abstract_class),
    (r"Unable to load config '([^']+)'", "--{key}: file {0!r} not found; give keys one by one, as in --{key}.KEY"),
    (r"File does not exist: '([^']+)'", "--{key}: file {0!r} not found"),
    (
        r"(?s).*Subtypes: \[((?:<class '(?:int|float|str|bool)'>|typing\.Literal\[[^\]]*\])[^\n]*)\]\n"
        r".*?Given value: ([^\n]*)",
        _wrong_type,
    ),
    (r"Expected a dot import path string: ([^\n]*)", _unknown_class),
    (r"Expected a (.+?)\. Got value: (.*)", _wrong_type),
    (r"Import path does not correspond to a subclass of (\w+)", "--{key}: expected a subclass of {0}, got {value}"),
    (r"the following arguments are required: (.+)", "expected a value for: {0}"),
    (r"(?s)Problems parsing config: (.+)", "--config: invalid YAML: {0}"),
    (r"(?s)Unexpected config: (.+)", "--config: expected keys and values, got {0:.60}"),
    (
        r"Not a valid subclass of (\w+)|argument of type '\w+' is not iterable",
        "--{key}: expected a class path, or keys and values, got {value}",
    ),
    (
        r"(?s)Subtypes: \[(?:list|collections)\[.*Given value: ([^\n]*)",
        "--{key}: expected a list, as in [a, b], got {0!r}",
    ),
    (
        r"(?s)Subtypes: \[dict\[.*Given value: ([^\n]*)",
        "--{key}: expected keys and values, as in {{a: [b, c]}}, got {0!r}",
    ),
]
