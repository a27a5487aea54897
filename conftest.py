"""Leave out the doctests of modules whose optional dependency is not installed: importing them would fail."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") is not None else ["fedekd/flower/*"]
