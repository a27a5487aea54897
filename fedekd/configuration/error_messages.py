"""A parser's complaint, which may run over ten lines, as one that names the flag, the value and what is allowed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module

from jsonargparse import ArgumentParser

from fedekd.errors import nearest


def explain(text: str, parser: ArgumentParser) -> str:
    """The complaint in one line.

    Args:
        text: What jsonargparse says.
        parser: Whose complaint it is; the nearest valid names are looked up in it.
    """
    if match := re.search(r'(?s)^Parser key "do_no_harm":.*import path.*Given value: (.*)', text):
        return f"--do_no_harm is {match[1].strip()!r}, and must be {_RULE}"
    for pattern, tell in _COMPLAINTS:
        if match := re.search(pattern, text):
            return tell(match, text, parser)
    # Unknown to us, so said in the parser's own words, up to where it begins to repeat the input.
    return " ".join(text.split("Given value type:")[0].split())


#: A class whose name nobody need know.
_RULE = "true or false, or have its arguments given, as in --do_no_harm.confidence 0.9"


def _options(parser: ArgumentParser) -> list[str]:
    return [option.lstrip("-") for action in parser._actions for option in action.option_strings]


def _flag(text: str) -> str:
    """The outermost key that a complaint is about, as a flag."""
    match = re.search(r'Parser key "([^"]+)"', text)
    return f"--{match[1]}" if match else "the configuration"


def _inner_flag(match: re.Match[str], text: str) -> str:
    """The key that a complaint within complaints is about, as a flag with all that lie around it."""
    keys = re.findall(r'Parser key "([^"]+)"', text[: match.end()])
    return f"--{'.'.join(keys)}" if keys else "the configuration"


def _unrecognized(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    given = match[1].split()[0]
    if not given.startswith("-"):
        return f"{given!r} belongs to no option; options begin with --"
    return f"unknown option {given.split('=')[0]}; {_near_option(given.split('=')[0].lstrip('-'), parser)}"


def _near_option(name: str, parser: ArgumentParser) -> str:
    group, _, _ = name.rpartition(".")
    known = _options(parser)
    siblings = [option for option in known if option.startswith(f"{group}.")] if group else []
    return nearest(name, siblings or known).replace("'", "--", 1).replace("'", "", 1)


def _unexpected_key(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    name = match[1]
    return f"unknown key {name!r} in the configuration; {nearest(name, _options(parser))}"


def _unexpected_in_group(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    group, name = match[1], match[2]
    known = [option.removeprefix(f"{group}.") for option in _options(parser) if option.startswith(f"{group}.")]
    return f"unknown option {group}.{name}; {nearest(name, known)}"


def _unexpected_in_class(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    class_path, name = match[1], match[2]
    module, _, attribute = class_path.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), attribute)).parameters
    if name in _DECIDED:
        return f"{_flag(text)}.{name} cannot be given: {_DECIDED[name]} it"
    hint = nearest(name, parameters) if parameters else "it takes no arguments"
    return f"{_flag(text)} {class_path} takes no {name!r}; {hint}"


#: Arguments that are filled in, and by what.
_DECIDED = {
    **dict.fromkeys(("in_channels", "image_size", "num_classes"), "the data decide"),
    "params": "the models decide",
}


def _subclasses(base: type) -> Iterator[type]:
    subclass: type
    for subclass in base.__subclasses__():
        if not inspect.isabstract(subclass) and not subclass.__name__.startswith("_"):
            yield subclass
        yield from _subclasses(subclass)


def _unknown_class(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    name = match[1]
    flag = _inner_flag(match, text)
    bases = re.findall(r"Subtypes: \[?<class '([^']+)'>", text[: match.end()])
    hint = "give a class path, as in package.module.Class"
    if bases:
        module, _, attribute = bases[-1].rpartition(".")
        known = {found.__name__ for found in _subclasses(getattr(import_module(module), attribute))}
        suggestion = nearest(name, known)
        # torch.nn.Module has hundreds of subclasses: a list of them all is no help.
        hint = suggestion if suggestion.startswith("did") or len(known) < 20 else hint
    return f"{flag} {name}: there is no such class; {hint}"


def _abstract_class(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    module, _, name = re.findall(r"Subtypes: \[?<class '([^']+)'>", text[: match.end()])[-1].rpartition(".")
    known = sorted(found.__name__ for found in _subclasses(getattr(import_module(module), name)))
    return f"{_inner_flag(match, text)} needs a class that can be made; choose from: {', '.join(known)}"


def _no_module(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    return f"{_inner_flag(match, text)} {match[1]}: {match[2].strip()}"


def _no_file(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    return f"{_flag(text)} {match[1]}: there is no such file, and keys are given one by one, as in {_flag(text)}.KEY"


def _broken_class_path(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    return f"{_flag(text)} {match[1]}: {' '.join(match[2].split())}"


def _wrong_type(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    return _must_be(text, match[2], [match[1]])


def _wrong_union(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    return _must_be(
        text, match[2], re.findall(r"<class '[^']+'>|collections\.abc\.Sequence|typing\.Literal\[[^\]]*\]", match[1])
    )


def _must_be(text: str, value: str, types: list[str]) -> str:
    flag, value = ".".join(re.findall(r'Parser key "([^"]+)"', text)), value.strip()
    allowed = " or ".join(filter(None, (_plain(expected, value) for expected in types)))
    return f"--{flag} is {value!r}, and must be {allowed}"


def _plain(expected: str, value: str) -> str:
    """A type in plain words; nothing for one that nobody can type in."""
    name = re.sub(r"<class '([^']+)'>", r"\1", expected)
    if name == "float" and value.lower().strip("+-.") in ("nan", "inf", "infinity"):
        return "a finite number"
    if elements := re.fullmatch(r"tuple with (\d+) elements", name):
        return f"a list of {elements[1]} values"
    return _PLAIN.get(name, re.sub(r"typing\.Literal\[(.*?)\]", _choice, name))


def _choice(literal: re.Match[str]) -> str:
    return f"one of {literal[1]}" if "," in literal[1] else literal[1]


_PLAIN = {
    **{"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"},
    **{"tuple": "a list, as in [0.6,0.2,0.2]", "list": "a list", "collections.abc.Sequence": "a list"},
    **{"dict": "keys and values", "torch.Tensor": ""},
}


def _not_a_subclass(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    given = text.rpartition("Given value: ")[2].strip()
    return f"{_flag(text)} {given}: it is no {match[1]}"


def _no_class(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    given = text.rpartition("Given value: ")[2].strip()
    return f"{_flag(text)} is {given}, and must be a class path, or have a class_path and init_args"


def _missing(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    names = ", ".join(f"--{name.strip()}" for name in match[1].split(","))
    return f"{names} must be given, there or in a configuration: --config digits.yaml"


def _not_yaml(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    return f"a configuration is not valid YAML: {' '.join(match[1].split())}"


def _not_a_mapping(match: re.Match[str], text: str, parser: ArgumentParser) -> str:
    return f"a configuration must hold keys and values, not {' '.join(match[1].split())[:60]!r}"


Complaint = Callable[[re.Match[str], str, ArgumentParser], str]

_COMPLAINTS: list[tuple[str, Complaint]] = [
    (r"unrecognized arguments: (.+)", _unrecognized),
    (r"^Option '([^']+)' is not accepted", _unexpected_key),
    (r"Group '([^']+)' does not accept option '([^']+)'", _unexpected_in_group),
    (r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted", _unexpected_in_class),
    (r"Problem with given class_path '([^']+)':\s+(No module named [^\n]+)", _no_module),
    (r"Expected an instantiatable class, but(?: \S+)? is abstract", _abstract_class),
    (r"Unable to load config '([^']+)'", _no_file),
    (
        r"(?s).*Subtypes: \[((?:<class '(?:int|float|str|bool)'>|typing\.Literal\[[^\]]*\])[^\n]*)\]\n"
        r".*?Given value: ([^\n]*)",
        _wrong_union,
    ),
    (r"Expected a dot import path string: (\S+)", _unknown_class),
    (r"Expected a (.+?)\. Got value: (.*)", _wrong_type),
    (r"Problem with given class_path '([^']+)':\s+(.+)", _broken_class_path),
    (r"Import path does not correspond to a subclass of (\w+)", _not_a_subclass),
    (r"Not a valid subclass of (\w+)|argument of type '\w+' is not iterable", _no_class),
    (r"the following arguments are required: (.+)", _missing),
    (r"(?s)Problems parsing config: (.+)", _not_yaml),
    (r"(?s)Unexpected config: (.+)", _not_a_mapping),
]
