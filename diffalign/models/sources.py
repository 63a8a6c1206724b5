"""Sources of models (``model.path``): a hub id, a diffusers folder, a single-file checkpoint, or a tiny
model."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from diffalign.errors import UserError, unknown
from diffalign.models.families.card import FamilyCard
from diffalign.models.families.registry import FAMILIES
from diffalign.tiny import FAMILIES as TINY

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SINGLE_FILE = (".safetensors", ".ckpt")
ALLOWED = (
    "allowed: a hub id (owner/name), a diffusers folder, a .safetensors or .ckpt checkpoint, "
    + ", ".join(f"tiny:{name}" for name in TINY)
)
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""File names of a LoRA in a folder: diffusers' and peft's."""
ADAPTER_KEY = re.compile(
    r"lora[._](down|up|A|B)(\.default)?\.weight$|lora_linear_layer\.(down|up)\.weight$"
    r"|\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks|oft_diag|diff(_b)?)\b"
)
"""In the names of an adapter's tensors, and in no checkpoint's."""
OVER_A_BASE = "give its base model, and with model.adapter the LoRA that training starts from"
EXPERT_FOLDERS = ("high_noise", "low_noise")
"""Folders of a LoRA of a model of two experts, a LoRA's folder for each."""


def resolve(path: str) -> str:
    """Return ``model.path`` as a folder, a file or a hub id.

    Raises:
        UserError: it is empty, an unknown tiny model, or a local path that does not exist.
    """
    if not path:
        raise UserError(f"model.path is empty; {ALLOWED}")
    if path.startswith("tiny:"):
        from diffalign.tiny import pipeline_path

        name = path.removeprefix("tiny:")
        if name not in TINY:
            raise unknown("tiny model (model.path)", path, [f"tiny:{f}" for f in TINY])
        return str(pipeline_path(name))
    expanded = os.path.expanduser(path)
    if os.path.exists(expanded):
        return expanded
    if expanded.endswith(SINGLE_FILE):
        raise UserError(f"model.path={path!r}: no such file; {ALLOWED}")
    if not HUB_ID.fullmatch(path):
        raise UserError(f"model.path={path!r}: no such file or folder, and not a hub id; {ALLOWED}")
    return path


def holds_lora(folder: str | Path) -> bool:
    """Whether a folder has the file of a LoRA, or one for each expert."""
    return any(Path(folder, where, name).is_file() for where in ("", *EXPERT_FOLDERS) for name in LORA_FILES)


def is_lora(path: str | Path) -> bool:
    """Return whether a path is a LoRA: a folder with its file, or a .safetensors file of factors (those of
    LyCORIS included, which ``lora_formats`` refuses by name).
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return holds_lora(path)
    return any(ADAPTER_KEY.search(key) for key in keys_of(str(path))[0])


def hub_kind(hub_id: str) -> str:
    """Return the kind of a repository on the hub: ``lora``, ``network`` (alone) or ``model``.

    Raises:
        UserError: it cannot be reached and is not in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with user_errors("model", hub_id):
        try:
            files = set(HfApi().list_repo_files(hub_id))
        except (OfflineModeIsEnabled, ConnectionError):
            folder = Path(snapshot_download(hub_id, local_files_only=True))
            files = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    if "model_index.json" in files:
        return "model"
    if files & {str(Path(where, name)) for where in ("", *EXPERT_FOLDERS) for name in LORA_FILES}:
        return "lora"
    return "network" if files & {"config.json", "unet/config.json", "transformer/config.json"} else "model"


def fetch_lora(hub_id: str, field: str = "model") -> str:
    """Fetch weights and configuration of a LoRA on the hub, and return their folder.

    Raises:
        UserError: no hub id, or it cannot be reached and is not in the cache.
    """
    from huggingface_hub import snapshot_download

    if not HUB_ID.fullmatch(hub_id):
        raise UserError(f"{field}={hub_id!r}: no such file or folder; allowed: a LoRA, a run, or a hub id")
    with user_errors(field, hub_id):
        return str(snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json"]))


def is_single_file(source: str) -> bool:
    """Whether a resolved source is a checkpoint file.

    Raises:
        UserError: it is a file of another kind.
    """
    if not os.path.isfile(source):
        return False
    if not source.endswith(SINGLE_FILE):
        raise UserError(
            f"model.path={source!r} is a file, but not a checkpoint; allowed: {', '.join(SINGLE_FILE)}"
        )
    return True


def sniff_family(file: str) -> FamilyCard:
    """Return the family of a single-file checkpoint, recognised by the names of its tensors.

    Raises:
        UserError: unreadable, a LoRA, or of no known family.
    """
    keys, _ = keys_of(file)
    for card in FAMILIES.values():
        if any(key.startswith(card.single_file_key) for key in keys):
            return card
    if any("lora" in key for key in keys):
        raise UserError(f"model.path={file!r} holds a LoRA, not a model; {OVER_A_BASE}")
    raise UserError(
        f"model.path={file!r} is no whole checkpoint of a known family ({', '.join(FAMILIES)}): "
        "its tensors have other names"
    )


@contextmanager
def user_errors(field: str, path: str) -> Iterator[None]:
    """Turn errors of diffusers and the hub for bad input into one UserError with advice."""
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (HfHubHTTPError, ConnectionError) as error:
        raise UserError(_unreachable(field, path, error)) from error
    except (OSError, ValueError, SafetensorError, EOFError) as error:
        local = os.path.exists(os.path.expanduser(path)) or path.startswith("tiny:")
        first = " ".join(str(error).split())[:300]
        raise UserError(
            f"{field}={path!r} cannot be loaded: {first}" if local else _unreachable(field, path, error)
        ) from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, NotImplementedError) as error:
        # a configuration with a value of another type or out of range
        first = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{field}={path!r} cannot be loaded, is its configuration damaged? ({first})"
        ) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "shape" not in str(error):
            raise
        raise UserError(
            f"{field}={path!r}: weights do not fit the configuration: {str(error)[:300]}"
        ) from error


def _unreachable(field: str, path: str, error: Exception) -> str:
    first = " ".join(str(error).split())[:200]
    return (
        f"{field}={path!r} is no local folder and could not be fetched from the hub ({first}). Check the "
        f"name; without network, run `hf download {path}` where there is one and give the folder; for a "
        "gated model run `hf auth login`"
    )


def keys_of(file: str, field: str = "model.path") -> tuple[list[str], dict[str, str]]:
    """Return the tensor names of a checkpoint file and, of a safetensors file, its metadata.

    Args:
        field: the option that names the file, for messages.

    Raises:
        UserError: it cannot be read, holds other objects than tensors, or is no mapping of names to tensors.
    """
    if file.endswith(".safetensors"):
        from safetensors import safe_open

        with user_errors(field, file), safe_open(file, framework="pt") as handle:
            return list(handle.keys()), dict(handle.metadata() or {})
    from pickle import UnpicklingError

    try:
        content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(
            f"{field}={file!r} cannot be read as a checkpoint of plain tensors: it is damaged, or a "
            "pickle of other objects, which could run code and is not loaded. Allowed: a .safetensors "
            "file, or a .ckpt of tensors alone; convert it where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{field}={file!r} cannot be read as a checkpoint of plain tensors: {str(error)[:200]}"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise UserError(
            f"{field}={file!r} holds a {type(state).__name__}; allowed: a mapping of names to tensors"
        )
    return [str(name) for name in state], {}
