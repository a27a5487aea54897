"""Patch of jsonargparse 4.53: a newly chosen class has its own defaults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace, _typehints

from fedekd.global_state import exclusive

_NAME = "discard_init_args_on_class_path_change"


def _discard_all(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """Discard all arguments; the original keeps those the new class accepts."""
    if isinstance(prev_val, Namespace) and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
        prev_val["init_args"] = Namespace()  # type: ignore[no-untyped-call]


@contextmanager
def own_defaults() -> Iterator[None]:
    """Context manager: reset `init_args` when `class_path` changes.

    Without it `--method SafeKD` would take the temperature of FedeKD: jsonargparse keeps arguments, defaults included,
    that both classes accept by name. Arguments given together with a class or after it apply to that class.
    """
    with exclusive():
        before = getattr(_typehints, _NAME)
        setattr(_typehints, _NAME, _discard_all)
        try:
            yield
        finally:
            setattr(_typehints, _NAME, before)
