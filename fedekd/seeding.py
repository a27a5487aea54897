"""Where every random number of a federation comes from.

A generator is never shared and never carried on: each is made anew from what it is for. So the order in which
clients run, the engine that runs them, and a stop and resume cannot change a number.
"""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(*purpose: int | str) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(seed, client, round, "private")`.

    Different purposes give independent seeds (BLAKE2b of the parts); the same purpose gives the same seed on
    every machine.

    Example:
        >>> derive_seed(0, 3, 1, "private") == derive_seed(0, 3, 1, "private")
        True
        >>> derive_seed(0, 3, 1, "private") == derive_seed(0, 31, "private")
        False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in purpose)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
