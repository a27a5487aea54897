"""Patches of jsonargparse 4.53: defaults of a class, YAML, factories, any types."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace, _loaders_dumpers, _postponed_annotations, _typehints
from torch import nn

from fedekd import models
from fedekd.configuration.yaml_files import load_yaml
from fedekd.global_state import exclusive

_return_type = _postponed_annotations.get_return_type
_resolve_by_name = _typehints.resolve_class_path_by_name


def _discard_all(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """Discard all arguments; the original keeps those the new class accepts."""
    if isinstance(prev_val, Namespace) and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
        prev_val["init_args"] = Namespace()  # type: ignore[no-untyped-call]


def _model_by_default(component: Any, logger: Any = None) -> Any:
    """Return the return type of a function; `nn.Module` without an annotation.

    `build_model` checks what the function returns.
    """
    if inspect.isfunction(component) and "return" not in component.__annotations__:
        return nn.Module
    return _return_type(component, logger)  # type: ignore[no-untyped-call]


def _resolve_class_path(base: Any, name: str) -> str:
    """Return the path of a class by its name; models of fedekd come first.

    Without it `MLP` is ambiguous as soon as torchvision is imported.
    """
    if base is nn.Module and name in models.__all__:
        return f"{models.__name__}.{name}"
    return str(_resolve_by_name(base, name))


def _load_value(text: str) -> Any:
    """Return a YAML value; `C:` and `{a, b}` are texts, as in jsonargparse."""
    value = load_yaml(text)
    has_no_values = isinstance(value, dict) and value and all(item is None for item in value.values())
    return text if has_no_values and "\n" not in text else value


def _unchanged(value: Any, *arguments: Any, **options: Any) -> Any:
    """Return a value; the original builds what has a class_path."""
    return value


_PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (_typehints, "discard_init_args_on_class_path_change", _discard_all),
    (_typehints, "resolve_class_path_by_name", _resolve_class_path),
    (_typehints, "adapt_classes_any", _unchanged),
    (_loaders_dumpers, "yaml_load", _load_value),
    (_loaders_dumpers, "loaders", {**_loaders_dumpers.loaders, "yaml": _load_value}),
    (_postponed_annotations, "get_return_type", _model_by_default),
)


@contextmanager
def patched_jsonargparse() -> Iterator[None]:
    """Context manager: apply the patches.

    - `init_args` are reset when `class_path` changes. Without it `--method SafeKD` would take the temperature of
      FedeKD: jsonargparse keeps arguments, defaults included, that both classes accept by name. Arguments given
      together with a class or after it apply to that class.
    - YAML is read by `load_yaml`, in files and on the command line.
    - A function without a return annotation is accepted as a model.
    - The name of a model of fedekd is not ambiguous.
    - A class_path in a value of any type, as in `data.sites`, stays in the configuration. The code that uses it builds
      the object, and reports errors with the name of the site.
    """
    with exclusive():
        before = [(module, name, getattr(module, name)) for module, name, _ in _PATCHES]
        for module, name, value in _PATCHES:
            setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)
