"""What engines have in common whose clients run in other processes: what is sent there, and what is told back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedekd.data import ImageData
from fedekd.federation.observer import SilentObserver
from fedekd.methods import Method


class EventForwarder(SilentObserver):
    """Tells the other side what happens.

    Args:
        tell: Takes the name of an event and its arguments, for `replay_events`.
    """

    def __init__(self, tell: Callable[[str, tuple[Any, ...]], None]) -> None:
        self.tell = tell

    def phase_started(self, client: int, phase: str) -> None:
        """See `Observer`."""
        self.tell("phase_started", (client, phase))

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        """See `Observer`."""
        self.tell("phase_finished", (client, phase, steps))

    def warn(self, text: str) -> None:
        """See `Observer`."""
        self.tell("warn", (text,))


def without_server_state(method: Method) -> Method:
    """A method as clients need it: without what the server keeps."""
    copied = copy.copy(method)
    copied.server_state = {}
    return copied


def without_images(images: ImageData) -> ImageData:
    """All that is known of a data set's images but the images themselves."""
    return replace(images, pixels=torch.empty(0, *images.pixels.shape[1:], dtype=torch.uint8))
