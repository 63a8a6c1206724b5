"""Fetch published reward weights from the hub, read them as plain tensors, and load them into a network.

Every failure (file missing, hub unreachable, weights of another model) is a UserError that names the reward,
the file and the remedy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError


def fetched(name: str, repository: str, filename: str, given: str = "FILE") -> Path:
    """Return the local path of a file of a hub repository, downloading it if the cache does not have it.

    Args:
        name: the reward's name, for messages.
        repository: hub id.
        filename: path of the file inside the repository.
        given: what follows ``name:`` in a spec that names a downloaded copy, for the message.

    Raises:
        UserError: the file is not cached, and the hub cannot be reached or has no such file.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename))
    except Exception as error:  # hub, http and file errors: all mean that the file is not here
        raise UserError(
            f"reward {name!r}: cannot fetch {filename} of {repository} ({type(error).__name__}). Check the "
            f"connection to the hub (HF_HUB_OFFLINE); a downloaded copy can be given as {name}:{given}"
        ) from error


def unloadable(name: str, what: str, error: Exception, given: str) -> UserError:
    """Return the UserError for a checkpoint or tokenizer that transformers could not load.

    Args:
        name: the reward's name.
        what: what could not be loaded, and from where.
        error: the exception that transformers raised.
        given: how a spec names a downloaded folder, such as "instead" or "as NAME:FOLDER".
    """
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"reward {name!r}: cannot load {what} ({type(error).__name__}: {reason}). Check the path, or the "
        f"connection to the hub (HF_HUB_OFFLINE); a downloaded folder can be given {given}"
    )


def check_complete(name: str, source: str, kind: str, loading: Mapping[str, Any]) -> None:
    """Check transformers' loading info (``output_loading_info``).

    Raises:
        UserError: a weight was missing or of another shape; it names the first.
    """
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        raise UserError(
            f"reward {name!r}: {source!r} is not a whole {kind}: {len(missing)} weights are missing or of "
            f"another shape, such as {missing[0]}; a folder or hub id of one is needed"
        )


def is_hub_id(place: str) -> bool:
    """Return whether ``place`` has the form ``owner/name`` and is no path of this machine."""
    path = Path(place)
    return not (path.exists() or path.is_absolute() or place.startswith(".")) and place.count("/") == 1


def read_state(name: str, path: Path | str) -> dict[str, Tensor]:
    """Return the state dict in a safetensors or torch file, on the CPU.

    If the file holds a mapping with the key ``state_dict`` or ``model``, that entry is returned.

    Raises:
        UserError: no such file, or its content is no mapping of tensors (nothing else is unpickled).
    """
    state = read_plain(name, path)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"reward {name!r}: {str(path)!r} holds no table of weights (it is a {type(state).__name__})"
        )
    return {str(key): tensor for key, tensor in state.items()}


def read_plain(name: str, path: Path | str) -> Any:
    """Return the content of a safetensors or torch file, tensors on the CPU.

    Raises:
        UserError: no such file, or it holds objects other than tensors, numbers, strings and containers of
            them.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"reward {name!r}: there is no file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and torch each raise their own kind
        raise UserError(
            f"reward {name!r}: {str(path)!r} is not a checkpoint of plain tensors ({type(error).__name__})"
        ) from error


def fill(name: str, network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into a network; names and shapes must match exactly, dtypes become the state dict's.

    The network may be on the meta device. The caller fills buffers that no checkpoint holds.

    Raises:
        UserError: a weight is missing, unexpected or of another shape; it names the first.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    actual = {key: tuple(tensor.shape) for key, tensor in state.items()}
    differing = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
    if differing:
        key = differing[0]
        raise UserError(
            f"reward {name!r}: {source!r} is another model's checkpoint: {len(differing)} weights differ, "
            f"first {key} (it has {actual.get(key, 'none')}, expected is {expected.get(key, 'none')})"
        )
    network.load_state_dict(dict(state), assign=True)
