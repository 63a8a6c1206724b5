"""Write parts of the package data: atomically, in float16, without local paths."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.utils.files import write_atomic


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def replace_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a temporary folder, then rename it to `folder`."""
    fresh = folder.with_name(f".{folder.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def forget_paths(folder: Path) -> None:
    """Remove local paths (``_name_or_path``) from the configurations in a folder."""
    for path in [*folder.rglob("config.json"), *folder.rglob("model_index.json")]:
        config = {k: v for k, v in json.loads(path.read_text()).items() if k != "_name_or_path"}
        write_atomic(path, json.dumps(config, indent=2) + "\n")


def half(folder: Path) -> None:
    """Store every safetensors file of a folder in float16."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in folder.rglob("*.safetensors"):
        tensors = {k: v.half() if v.dtype == torch.float32 else v for k, v in load_file(path).items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write a pipeline in float16, atomically."""

    def save(fresh: Path) -> None:
        from transformers import CLIPTokenizer

        from diffalign.tiny_build import text

        pipe.save_pretrained(fresh)
        for name in ("tokenizer", "tokenizer_2"):
            if isinstance(getattr(pipe, name, None), CLIPTokenizer):
                text.save(getattr(pipe, name), fresh / name)
        forget_paths(fresh)
        half(fresh)

    replace_folder(folder, save)
