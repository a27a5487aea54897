"""Code that decides a result: modules, and all modules that they import."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from hashlib import sha256
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

import fedekd

#: Parts of the package that decide the numbers of a run.
RESULT_CODE = (
    *("data", "do_no_harm", "early_exit", "federation", "functional", "methods", "metrics", "models", "modules"),
    "privacy",
    *("global_state.py", "seeding.py", "tasks.py"),
)

#: Calls that import a module; with a computed name, the module cannot be read from the source.
_IMPORTING_CALLS = {"import_module", "__import__"}
_OTHER_CALLS = {"run_path", "run_module", "spec_from_file_location", "exec"}


class SourceUnavailableError(Exception):
    """Raised where the code of a module cannot be read from files."""


@cache
def package_code(parts: tuple[str, ...] = RESULT_CODE) -> str:
    """Return the SHA-256 (hex) of files and folders of the package."""
    root = Path(fedekd.__file__).parent
    files = [root / part for part in parts if part.endswith(".py")]
    files += [path for part in parts for path in sorted((root / part).rglob("*.py"))]
    names = (path.relative_to(root).as_posix().encode() for path in files)
    return sha256(b"".join(name + path.read_bytes() for name, path in zip(names, files, strict=True))).hexdigest()


def modules_of(objects: Iterable[object]) -> set[str]:
    """Return the modules of the classes of objects, without those of fedekd.

    Base classes are included.
    """
    modules = {base.__module__ for item in objects for base in type(item).__mro__}
    return {name for name in modules if name.partition(".")[0] != "fedekd"}


def code_of(modules: Iterable[str]) -> dict[str, str]:
    """Identify the code of modules and of all modules that they import.

    Imports are read from the source, also those within functions. Nothing is imported.

    Args:
        modules: Names of modules that are imported in this process.

    Returns:
        The SHA-256 of each file by name of the module; the version of installed distributions, PyTorch and Python.
        A module of fedekd stands for all of `RESULT_CODE`.

    Raises:
        SourceUnavailableError: If a module has no file, as in a notebook, or imports modules by computed names.
    """
    found: dict[str, str] = {}
    seen = set[str]()
    required = set(modules)
    waiting = sorted(required)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        top, _, _ = name.partition(".")
        parent, _, _ = name.rpartition(".")
        if parent:
            waiting.append(parent)
        if top in ("torch", "fedekd") or top in sys.stdlib_module_names:
            versions = {"torch": torch.__version__, "fedekd": package_code()}
            found[top if top in versions else "python"] = versions.get(top, platform.python_version())
            continue
        spec = _locate(name)
        file = _file(name, spec)
        if file is None:
            if name in required and (spec is None or spec.submodule_search_locations is None):
                raise SourceUnavailableError(f"module {name} has no file")
            if spec is None and not parent:
                found[name] = "missing"  # an optional import: another result once it is installed
            continue
        if version := _version(top, file):
            found[top] = version
            continue
        content = _content(name, file)
        label = name if spec is None else spec.name
        found["__main__" if label == "__mp_main__" else label] = sha256(content).hexdigest()
        if file.suffix == ".py":
            is_package = spec is not None and spec.submodule_search_locations is not None
            waiting += _imports(content, label, is_package)
    return found


@cache
def is_installed(module: str) -> bool:
    """Return whether a module is PyTorch's or of another installed package."""
    spec = _locate(module)
    file = _file(module, spec)
    top, _, _ = module.partition(".")
    return top == "torch" or (file is not None and _version(top, file) is not None)


def _locate(name: str) -> ModuleSpec | None:
    """Return the spec of a module.

    `importlib.util.find_spec` would import its packages.
    """
    if (module := sys.modules.get(name)) is not None:
        spec = getattr(module, "__spec__", None)
        return spec if isinstance(spec, ModuleSpec) else None  # of a script, or made by hand: none
    parent, _, _ = name.rpartition(".")
    folders = None
    if parent:
        package = _locate(parent)
        folders = None if package is None else package.submodule_search_locations
        if folders is None:
            return None
    found = (finder.find_spec(name, folders) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)


def _file(name: str, spec: ModuleSpec | None) -> Path | None:
    """Return the file of a module, None where there is none."""
    origin = getattr(sys.modules.get(name), "__file__", None) if spec is None else spec.origin
    return None if origin is None or (spec is not None and not spec.has_location) else Path(origin)


def _process_start() -> float:
    """Return the start of this process, in seconds since the epoch; else 0."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        # A tick later, since it is rounded down: Python reads a script later than that.
        ticks = int(fields[19]) + 1
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        return 0.0


_PROCESS_STARTED = _process_start()


class _ImportTimes(MetaPathFinder):
    """Finder that finds nothing, and notes when a module is about to be loaded.

    Attributes:
        times: Seconds since the epoch by module name. A module that is not listed was loaded before this one.
    """

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> None:
        """Note the time of an import, or of `importlib.reload`."""
        if fullname not in sys.modules or target is not None:
            self.times[fullname] = time.time()


_imports_seen = _ImportTimes()
sys.meta_path.insert(0, _imports_seen)

#: By module name: the spec (of a script, the module) with which it was loaded, and its file's content then.
_loaded: dict[str, tuple[object, bytes]] = {}


def _content(name: str, file: Path) -> bytes:
    """Read a file; of a loaded module, return what the first call read.

    A file may be edited while the process, such as a notebook, continues with the code that it has loaded.

    Raises:
        SourceUnavailableError: If the file cannot be read, or may have changed since the module was loaded.
    """
    module = sys.modules.get(name)
    loaded_as = getattr(module, "__spec__", None) or module
    if loaded_as is not None and name in _loaded and _loaded[name][0] is loaded_as:
        return _loaded[name][1]
    try:
        content, status = file.read_bytes(), file.stat()
    except OSError as error:
        raise SourceUnavailableError(f"the file of module {name} cannot be read") from error
    if loaded_as is not None:
        # A move or a copy can keep the time of the last write, but not the other one.
        if max(status.st_mtime, status.st_ctime) > _imports_seen.times.get(name, _PROCESS_STARTED):
            raise SourceUnavailableError(f"the file of module {name} may have changed since it was imported")
        _loaded[name] = loaded_as, content
    return content


@lru_cache(maxsize=4096)
def _imports(content: bytes, name: str, is_package: bool) -> tuple[str, ...]:
    """Return the modules that a source may import.

    Raises:
        SourceUnavailableError: If one is imported by a computed name.
    """
    package = name if is_package else name.rpartition(".")[0]
    try:
        tree = ast.parse(content)
    except SyntaxError as error:
        raise SourceUnavailableError(f"the source of module {name} is not valid Python") from error
    names = [found for node in ast.walk(tree) for found in _named(node, name, package)]
    if is_package:  # `__all__` of a star import, or submodules that are loaded at their first use
        constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        names += [f"{name}.{value}" for value in constants if isinstance(value, str) and value.isidentifier()]
    return tuple(dict.fromkeys(names))


def _named(node: ast.AST, name: str, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute("." * node.level + (node.module or ""), package)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)  # a submodule, or a name in the module
    elif isinstance(node, ast.Call):
        is_name = isinstance(node.func, ast.Name)
        called = getattr(node.func, "id" if is_name else "attr", "")
        first = node.args[0] if node.args else None
        if called in _IMPORTING_CALLS and isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield _absolute(first.value, package)
        elif called in _IMPORTING_CALLS or (called in _OTHER_CALLS and (is_name or called != "exec")):
            raise SourceUnavailableError(f"module {name}, line {node.lineno}, imports by a computed name")


def _absolute(name: str, package: str) -> str:
    try:
        return importlib.util.resolve_name(name, package)
    except ImportError:  # the import itself would fail
        return name.lstrip(".")


@cache
def _version(top: str, file: Path) -> str | None:
    """Return the version of the distribution of a file.

    None for the code of a user, also if it is installed from a folder.
    """
    if not {"site-packages", "dist-packages"} & set(file.parts):
        return None
    try:
        distributions = [metadata.distribution(top)]
    except metadata.PackageNotFoundError:
        distributions = [metadata.distribution(name) for name in sorted(set(_distributions().get(top, ())))]
    origins = [distribution.read_text("direct_url.json") or "" for distribution in distributions]
    if not distributions or any("dir_info" in origin for origin in origins):  # installed from a folder of sources
        return None
    names = (f"{distribution.name} {distribution.version}" for distribution in distributions)
    return "; ".join(f"{name} {origin}".strip() for name, origin in zip(names, origins, strict=True))


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())
