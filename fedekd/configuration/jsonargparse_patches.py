"""A class that is chosen anew begins with its own defaults, not with those of the class before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace, _typehints

_NAME = "discard_init_args_on_class_path_change"


def _forget(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """In place of jsonargparse's own, which forgets only what the new class does not know by name."""
    if isinstance(prev_val, Namespace) and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
        prev_val["init_args"] = Namespace()  # type: ignore[no-untyped-call]


@contextmanager
def own_defaults() -> Iterator[None]:
    """Inside, `--method SafeKD` has SafeKD's temperature, whatever FedeKD's is.

    jsonargparse keeps the arguments of the class before that have the same name in the new one, and its defaults are
    among them: of the default method, or of the one in a configuration. Only what is said together with a class, or
    after it, is meant for it.
    """
    before = getattr(_typehints, _NAME)
    setattr(_typehints, _NAME, _forget)
    try:
        yield
    finally:
        setattr(_typehints, _NAME, before)
