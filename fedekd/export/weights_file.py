"""Weights with the specification of their model, in a safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from fedekd.errors import UserError, describe_error, require, shorten_path
from fedekd.export.served import ServedNetwork
from fedekd.export.specification import ModelSpecification
from fedekd.models.weights import METADATA_KEY, read_weights, unpack_safetensors

Model = TypeVar("Model", bound=nn.Module)


def weights_file(tensors: Mapping[str, Tensor], specification: ModelSpecification) -> bytes:
    """Return the content of a safetensors file with the specification.

    Args:
        tensors: Tensors by name, as `deployed_tensors` returns them.
        specification: Specification of the model.

    Raises:
        UserError: If safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError(
            "--format: expected the package safetensors. Install it by: pip install 'fedekd[export]'"
        ) from error
    metadata = {"format": "pt", METADATA_KEY: specification.to_json()}
    content: bytes = save(dict(tensors), metadata)
    return content


def load_network(path: str | Path, trusted_modules: Sequence[str] = ()) -> nn.Module:
    """Load the network of a file that `fedekd export --format safetensors` wrote.

    Args:
        path: Path of the file.
        trusted_modules: Modules or packages of your own networks, which the file may import. Without it, only networks
            of `fedekd.models`, `torchvision.models` and `timm` are built. Default: none.

    Returns:
        Network on the CPU in evaluation mode, for training or inference: a plain one, a
        `fedekd.models.MultiExitNetwork`, or an ensemble. It takes preprocessed inputs: images in [-1, 1]. See
        `load_served` for raw inputs.

    Raises:
        UserError: If the file cannot be read, or its network cannot be built.

    Example:
        >>> network = load_network("exported/model.safetensors")  # doctest: +SKIP
    """
    tensors, specification = read_export(path)
    return _built(path, lambda: specification.build(tensors, trusted_modules))


def load_served(path: str | Path, trusted_modules: Sequence[str] = ()) -> ServedNetwork:
    """Load the deployed model of a file that `fedekd export` wrote.

    Args:
        path: Path of the safetensors file.
        trusted_modules: As in `load_network`.

    Returns:
        Module on the CPU in evaluation mode, from raw inputs (B, ...) to the outputs named by `OUTPUTS`; `network` and
        `policy` are its parts.

    Raises:
        UserError: As `load_network`.

    Example:
        >>> label, probabilities, *_ = load_served("exported/model.safetensors")(images)  # doctest: +SKIP
    """
    tensors, specification = read_export(path)
    return _built(path, lambda: specification.build_served(tensors, trusted_modules))


def _built(path: str | Path, build: Callable[[], Model]) -> Model:
    try:
        return build()
    except UserError as error:
        raise UserError(f"path: {shorten_path(path)}: {error}") from error
    except Exception as error:  # tensors that do not fit raise several classes
        raise UserError(
            f"path: expected tensors that fit the specification, got {shorten_path(path)} with"
            f" {describe_error(error, 120)}"
        ) from error


def read_export(path: str | Path) -> tuple[dict[str, Tensor], ModelSpecification]:
    """Return the tensors and the specification of a safetensors file.

    Raises:
        UserError: If the file cannot be read, or has no specification.
    """
    return unpack_export(read_weights(str(path), "path"), str(path))


def unpack_export(content: bytes, path: str) -> tuple[dict[str, Tensor], ModelSpecification]:
    """Return the tensors and the specification of the content of a file."""
    tensors, metadata = unpack_safetensors(content, path, "path")
    require(METADATA_KEY in metadata, "path", "a file of fedekd export --format safetensors", path)
    return tensors, ModelSpecification.from_json(metadata[METADATA_KEY])
