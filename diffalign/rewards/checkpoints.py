"""Published weights of rewards: fetched from the hub, read as plain tensors, and held against a network.

Whatever is wrong with them - not there, unreachable, another model's - is a UserError that names the reward,
the file and what to do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError


def fetched(name: str, repository: str, filename: str, given: str = "FILE") -> Path:
    """Return a file of a hub repository, from the local cache if it is there.

    ``given`` is how the reward ``name`` is told of a downloaded copy, for the message.

    Raises:
        UserError: it is not here and the hub cannot be reached, or has no such file.
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
    """Return what to tell the user of something that transformers could not load.

    Args:
        name: of the reward that asks.
        what: could not be loaded, and from where.
        error: that it raised.
        given: how the reward takes a downloaded folder.
    """
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"reward {name!r}: cannot load {what} ({type(error).__name__}: {reason}). Check the path, or the "
        f"connection to the hub (HF_HUB_OFFLINE); a downloaded folder can be given {given}"
    )


def check_whole(name: str, source: str, kind: str, loading: Mapping[str, Any]) -> None:
    """UserError naming the first weight that transformers' loading info says was missing, or did not fit."""
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        raise UserError(
            f"reward {name!r}: {source!r} is not a whole {kind}: {len(missing)} weights are missing or of "
            f"another shape, such as {missing[0]}; a folder or hub id of one is needed"
        )


def is_hub_id(place: str) -> bool:
    """Whether a place is nothing on this machine and may be ``owner/name`` on the hub."""
    path = Path(place)
    return not (path.exists() or path.is_absolute() or place.startswith(".")) and place.count("/") == 1


def read_state(name: str, path: Path | str) -> dict[str, Tensor]:
    """Return the table of weights in a safetensors or torch file, on the CPU; a dict under ``state_dict`` is
    opened.

    Raises:
        UserError: no such file, or no table of plain tensors (nothing else is unpickled).
    """
    state = read_plain(name, path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"reward {name!r}: {str(path)!r} holds no table of weights (it is a {type(state).__name__})"
        )
    return {str(key): tensor for key, tensor in state.items()}


def read_plain(name: str, path: Path | str) -> Any:
    """Whatever a safetensors or torch file holds, tensors on the CPU.

    Raises:
        UserError: no such file, or more in it than tensors, numbers, words and containers of them.
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
    """Put weights into a network whose names and shapes they must be, all of them; dtypes are the weights'.

    The network may be on the meta device; buffers that no checkpoint has are the caller's to fill.

    Raises:
        UserError: a weight is missing, left over or of another shape; the first is named.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if differing:
        key = differing[0]
        there, needed = found.get(key, "none"), expected.get(key, "none")
        raise UserError(
            f"reward {name!r}: {source!r} is another model's checkpoint: {len(differing)} weights differ, "
            f"first {key} (it has {there}, expected is {needed})"
        )
    network.load_state_dict(dict(state), assign=True)
