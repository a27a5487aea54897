"""Seeds of all random numbers of a federation.

Generators are never shared or stored: each is created from the seed of its purpose. The order of clients, the engine,
and a stop and resume therefore change no number.
"""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(*purpose: int | str) -> int:
    """Return the seed of a purpose.

    Args:
        purpose: Integers and strings that identify the purpose, as in `derive_seed(seed, client, round, "private")`.

    Returns:
        A 63-bit integer (BLAKE2b of the parts), the same on every machine.

    Example:
        >>> derive_seed(0, 3, 1, "private") == derive_seed(0, 3, 1, "private")
        True
        >>> derive_seed(0, 3, 1, "private") == derive_seed(0, 31, "private")
        False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in purpose)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
