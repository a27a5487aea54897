"""Weights of ONNX branches: moved into the branch that uses them."""

from __future__ import annotations

from typing import Any


def with_local_weights(content: bytes) -> bytes:
    """Move each initializer into the innermost branch that has all its uses.

    onnxruntime prepares weights for its kernels only in the graph that has them: the last exit of a network of three
    exits on images of 8 x 8 takes 0.07 instead of 0.13 ms.

    Args:
        content: An ONNX file.
    """
    import onnx

    model = onnx.load_from_string(content)
    _push(model.graph)
    serialized: bytes = model.SerializeToString()
    return serialized


def _push(graph: Any) -> None:
    branches = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    names = [_used(branch) for branch in branches]
    kept = {value.name for value in graph.output} | {name for node in graph.node for name in node.input}
    for tensor in list(graph.initializer):
        users = [branch for branch, used in zip(branches, names, strict=True) if tensor.name in used]
        if tensor.name not in kept and len(users) == 1:
            users[0].initializer.append(tensor)
            graph.initializer.remove(tensor)
    for branch in branches:
        _push(branch)


def _used(graph: Any) -> set[str]:
    """Return the names that a graph reads, those of its branches included."""
    names = {value.name for value in graph.output}
    for node in graph.node:
        names |= set(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _used(attribute.g)
    return names
