"""What is collected where an extra is missing: the doctests of its modules cannot be, since nothing imports them."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") is not None else ["fedekd/flower/*"]
