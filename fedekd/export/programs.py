"""Programs of a deployed model: torch.export and ONNX."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.errors import UserError, describe_error, shorten
from fedekd.export.branches import with_local_weights
from fedekd.export.inputs import InputFormat
from fedekd.export.served import OUTPUTS, EarlyExitNetwork, ServedNetwork

BATCH = "batch"
"""Name of the dynamic dimension."""

#: Samples of the traced batch: torch.export takes sizes 0 and 1 as constants.
_TRACED_BATCH = 3

#: Loggers that report optimizations of a graph.
_LOGGERS = ("onnx_ir", "onnxscript", "torch.onnx", "torch.export")


def torch_program(served: ServedNetwork, inputs: InputFormat, metadata: Mapping[str, str]) -> bytes:
    """Return a `.pt2` file of `torch.export`, for any batch size.

    Args:
        served: Deployed model.
        inputs: Its raw inputs.
        metadata: Texts by name, stored as extra files.

    Raises:
        UserError: If the network cannot be exported; the message has the layer.
    """
    program = _exported(served, inputs, is_dynamic=True)
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files=dict(metadata))
    return buffer.getvalue()


def onnx_program(served: ServedNetwork, inputs: InputFormat, metadata: Mapping[str, str], early_exit: bool) -> bytes:
    """Return an ONNX file, with outputs named by `OUTPUTS`.

    Args:
        served: Deployed model.
        inputs: Its raw inputs.
        metadata: Texts by name, stored in the file.
        early_exit: True for one sample and nested `If`, see `EarlyExitNetwork`; False for any batch size.

    Raises:
        UserError: If onnx is not installed, or a layer cannot be exported; the message has the layer.
    """
    try:
        import onnxruntime  # noqa: F401 - the check of the file needs it
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--format: expected the packages onnx, onnxscript and onnxruntime. Install them by: pip install"
            " 'fedekd[export]'"
        ) from error
    module = EarlyExitNetwork(served) if early_exit else served
    program = _exported(module, inputs, is_dynamic=not early_exit)
    try:
        with _quiet():
            converted: Any = torch.onnx.export(
                program,
                (),
                input_names=[inputs.name],
                output_names=list(OUTPUTS[served.task]),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the converter raises several classes
        raise _not_convertible(error, program) from error
    converted.model.metadata_props.update(metadata)
    buffer = io.BytesIO()
    converted.save(buffer)
    return with_local_weights(buffer.getvalue()) if early_exit else buffer.getvalue()


def _exported(module: nn.Module, inputs: InputFormat, is_dynamic: bool) -> torch.export.ExportedProgram:
    example = torch.zeros(_TRACED_BATCH if is_dynamic else 1, *inputs.shape, dtype=inputs.dtype)
    shapes = ({0: torch.export.Dim(BATCH, min=1)},) if is_dynamic else None
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of torch.export, or of a user's network
        layer = _failing_layer(module, example)
        raise UserError(
            f"--format: expected a network that torch.export accepts, got {layer}, which fails with"
            f" {describe_error(_cause(error), 160)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: silence the reports of the exporters."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _cause(error: BaseException) -> BaseException:
    """Return the first error of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _failing_layer(module: nn.Module, example: Tensor) -> str:
    """Return the innermost layer that torch.export rejects."""
    calls: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
    hooks = [
        part.register_forward_hook(lambda part, args, _, name=name: calls.append((name, part, args)))
        for name, part in module.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            module(example)
    except Exception:  # the network itself fails
        return "the network"
    finally:
        for hook in hooks:
            hook.remove()
    for name, part, args in calls:  # a layer ends before the one that has it
        if not all(isinstance(value, Tensor) for value in args):
            continue
        shapes = tuple({0: torch.export.Dim.AUTO} for _ in args)
        try:
            with _quiet(), torch.no_grad():
                torch.export.export(part, args, dynamic_shapes=shapes if len(example) > 1 else None, strict=False)
        except Exception:
            return _layer(name, type(part).__name__)
    return "the network"


def _layer(path: str, kind: str) -> str:
    """Return a layer in sentences, without the modules around the network."""
    for prefix in ("served.", "network."):
        path = path.removeprefix(prefix)
    return f"layer {shorten(path)!r} ({shorten(kind)})"


def _not_convertible(error: Exception, program: torch.export.ExportedProgram) -> UserError:
    """Return the error of a layer that ONNX cannot express."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    for graph_module in program.graph_module.modules():
        for node in getattr(graph_module, "graph", torch.fx.Graph()).nodes:
            stack = node.meta.get("nn_module_stack")
            if node.op == "call_function" and stack and (f"%{node.name} " in text or f"'{node.target}'" in text):
                path, kind = list(stack.values())[-1]
                kind = kind if isinstance(kind, str) else kind.__name__
                layer = _layer(path, kind.rpartition(".")[2])
                return UserError(
                    f"--format: expected layers that ONNX can express, got {layer} with the operator {node.target}. Use"
                    " --format torch, or another layer"
                )
    return UserError(
        "--format: expected layers that ONNX can express. The converter reports: "
        f"{describe_error(_cause(error), 160)}. Use --format torch"
    )
