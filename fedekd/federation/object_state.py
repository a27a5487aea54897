"""State of any object as JSON, for content hashes."""

from __future__ import annotations

import copyreg
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedekd.atomic import digest
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.federation.source_code import SourceUnavailableError

#: Attributes of every `nn.Module`; parameters, buffers and submodules are hashed otherwise.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

#: Depth to which objects are read; an object of a list is two levels below the list.
_DEPTH = 16

#: Attributes of a class that do not decide its behaviour.
_OF_EVERY_CLASS = {"__dict__", "__weakref__", "__doc__", "_abc_impl"}


class StateReader:
    """Convert objects to JSON: equal results for equal classes, functions and values.

    An object is its class and what `pickle` would store, a function its code, its defaults and the values that it
    closes over, a tensor or array its digest. An object that was read before is its number.

    Args:
        network: Network whose modules are read by `attributes`; within them, its modules are numbers.

    Attributes:
        modules: Names of the modules of all classes and functions that were read.
    """

    def __init__(self, network: nn.Module) -> None:
        self.modules = set[str]()
        self._network = network
        self._numbers = {id(part): number for number, part in enumerate(network.modules())}
        self._kept: list[object] = []  # an identity is unique only while the object exists

    def attributes(self) -> list[Any]:
        """Return the class and the own attributes of each module of the network.

        Raises:
            SourceUnavailableError: If an attribute has no readable state.
        """
        return [self._module(part, _DEPTH) for part in self._network.modules()]

    def read(self, value: Any, depth: int = _DEPTH) -> Any:
        """Return a value as JSON.

        Raises:
            SourceUnavailableError: If it has no readable state, or more than `_DEPTH` levels.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if depth == 0:
            raise SourceUnavailableError(f"a {type(value).__qualname__} has more than {_DEPTH} levels of state")
        if type(value) is tuple and not value:  # one object in all of Python
            return ["tuple", []]
        if id(value) in self._numbers:
            return ["number", self._numbers[id(value)]]
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        return [self._name(type(value)), self._content(value, depth - 1)]

    def _content(self, value: Any, depth: int) -> Any:
        if isinstance(value, bytes | bytearray):
            return digest(bytes(value))
        if isinstance(value, Tensor | np.ndarray):
            return self._array(value, depth)
        if isinstance(value, ModuleType):
            self.modules.add(value.__name__)
            return value.__name__
        if isinstance(value, nn.Module):
            return [network_fingerprint(value), [self._module(part, depth) for part in value.modules()]]
        if isinstance(value, type):
            return self._class(value, depth)
        if isinstance(value, FunctionType):
            captured = [_captured(cell) for cell in value.__closure__ or ()]
            parts = (value.__code__, value.__defaults__, value.__kwdefaults__, captured, vars(value))
            return [self._name(value), [self.read(part, depth) for part in parts]]
        if isinstance(value, CodeType):
            names = (value.co_names, value.co_varnames, value.co_freevars)
            return [value.co_firstlineno, value.co_code.hex(), names, self.read(value.co_consts, depth)]
        if type(value) is dict:
            return [[self.read(key, depth), self.read(item, depth)] for key, item in value.items()]
        if isinstance(value, list | tuple) and not hasattr(value, "__dict__"):
            return [self.read(item, depth) for item in value]
        if isinstance(value, set | frozenset):
            return sorted(str(self.read(item, depth)) for item in sorted(value, key=repr))
        return self._reduced(value, depth)

    def _reduced(self, value: Any, depth: int) -> Any:
        """Return what `pickle` would store, and the attributes."""
        attributes = getattr(value, "__dict__", None)  # first: a partial stores its dictionary from the first use on
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:  # a lock, a generator, or any class's own method
            raise SourceUnavailableError(f"a {type(value).__qualname__} has no readable state") from error
        if isinstance(reduced, str):
            return [self._name(value), reduced, self.read(attributes, depth)]
        parts = [list(part) if index > 2 and part is not None else part for index, part in enumerate(reduced[:5])]
        return self.read([*parts, attributes], depth)

    def _array(self, value: Tensor | np.ndarray[Any, Any], depth: int) -> Any:
        if isinstance(value, Tensor):
            try:
                content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            except RuntimeError as error:  # sparse, or without values
                raise SourceUnavailableError(f"a tensor of {value.layout} has no readable state") from error
        elif value.dtype.hasobject:
            return [list(value.shape), self.read(value.ravel().tolist(), depth)]
        else:
            content = np.ascontiguousarray(value)
        return [str(value.dtype), list(value.shape), digest(content.tobytes())]

    def _class(self, value: type, depth: int) -> Any:
        """Return the name; of a class in a function, also what its methods use."""
        if "<locals>" not in value.__qualname__:
            return self._name(value)
        parts: list[Any] = [self._name(value)]
        for base in value.__mro__:
            if "<locals>" in base.__qualname__:
                for name, item in vars(base).items():
                    method = getattr(item, "__func__", getattr(item, "fget", item))
                    if isinstance(item, property):
                        method = [item.fget, item.fset, item.fdel]
                    if name not in _OF_EVERY_CLASS:
                        parts.append([name, self.read(method, depth)])
        return parts

    def _module(self, part: nn.Module, depth: int) -> Any:
        own = {name: item for name, item in vars(part).items() if name not in _OF_EVERY_MODULE}
        return [self.read(type(part), depth), [[name, self.read(item, depth)] for name, item in own.items()]]

    def _name(self, value: Any) -> str:
        """Return the name of a class or function with its module, which is noted."""
        bases = value.__mro__ if isinstance(value, type) else [value]
        names = [getattr(base, "__module__", None) for base in bases]
        self.modules.update(name for name in names if isinstance(name, str))
        return f"{names[0]}.{getattr(value, '__qualname__', '')}"


def _captured(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None
