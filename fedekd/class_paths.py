"""Objects that a configuration describes by class_path and init_args."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from fedekd.errors import UserError, describe_error, nearest, shorten


def build_object(option: str, spec: Any, package: str = "") -> Any:
    """Import a class or function and call it.

    Mappings with `class_path` among the arguments are built, too.

    Args:
        option: Name of the option in errors, such as `data.transform`.
        spec: Class path, or a mapping with `class_path` and optionally `init_args`.
        package: Package of bare names.

    Raises:
        UserError: If it cannot be imported, or the call fails.

    Example:
        >>> build_object("data.transform", {"class_path": "fractions.Fraction", "init_args": {"numerator": 3}})
        Fraction(3, 1)
    """
    class_path, arguments = class_path_of(option, spec)
    factory = _locate(option, class_path, package)
    arguments = {name: _built(option, value, package) for name, value in arguments.items()}
    try:
        return factory(**arguments)
    except UserError:
        raise
    except Exception as error:  # a user's constructor may raise anything
        raise UserError(
            f"{option}: expected arguments of {shorten(class_path)}, got {shorten(repr(arguments))}, which failed with"
            f" {describe_error(error, 150)}"
        ) from error


def class_path_of(option: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """Return the class path and the arguments of a specification.

    Raises:
        UserError: If it is neither a class path nor a mapping with `class_path` and optionally `init_args`.
    """
    if isinstance(spec, str) and spec:
        return spec, {}
    fields = spec if isinstance(spec, Mapping) else getattr(spec, "__dict__", {})  # a namespace of jsonargparse
    class_path, arguments = fields.get("class_path"), fields.get("init_args") or {}
    arguments = arguments if isinstance(arguments, Mapping) else getattr(arguments, "__dict__", None)
    if not (isinstance(class_path, str) and arguments is not None and {*fields} <= {"class_path", "init_args"}):
        raise UserError(f"{option}: expected class_path and optionally init_args, got {shorten(repr(spec))}")
    return class_path, dict(arguments)


def class_paths_in(spec: Any) -> Iterator[str]:
    """Yield the class paths in a specification, or in a list of them."""
    if isinstance(spec, str):
        yield spec
    elif isinstance(spec, Mapping):
        if isinstance(spec.get("class_path"), str):
            yield spec["class_path"]
        for value in (spec.get("init_args") or {}).values():
            yield from class_paths_in(value) if not isinstance(value, str) else ()
    elif isinstance(spec, list | tuple):
        for value in spec:
            yield from class_paths_in(value) if isinstance(value, Mapping | str) else ()


def _built(option: str, value: Any, package: str) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return build_object(option, value, package)
    if isinstance(value, list):
        return [_built(option, item, package) for item in value]
    return value


def _locate(option: str, class_path: str, package: str) -> Any:
    module_name, _, name = class_path.rpartition(".")
    try:
        if not (module_name or package):
            raise ImportError("a class path has a module and a class, as in package.module.Class")
        module = import_module(module_name or package)
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f"{option}: expected a class that can be imported, got {shorten(repr(class_path))}."
            f" {describe_error(error, 150)}"
        ) from error
    factory = getattr(module, name, None)
    if callable(factory):
        return factory
    names = [known for known in dir(module) if not known.startswith("_") and callable(getattr(module, known))]
    raise UserError(
        f"{option}: expected a class of {module.__name__}, got {shorten(repr(name))}. {nearest(name, names)}"
    )
