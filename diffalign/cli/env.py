"""``diffalign env``: versions and hardware, to paste into a bug report."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from diffalign.cli.common import make_parser, parse, print_json

PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy",
    "pyarrow", "pillow", "bitsandbytes", "xformers", "wandb", "trackio", "tensorboard",
)  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """Print versions and hardware."""
    parser = make_parser(
        "env", "Versions and hardware, for bug reports.", "diffalign env\ndiffalign env --json"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parse(parser, argv)
    facts = environment()
    if args.json:
        print_json(facts)
        return 0
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return 0


def environment() -> dict[str, Any]:
    """Return names and values; a package that is not installed is None."""
    from diffalign import __version__

    facts: dict[str, Any] = {
        "diffalign": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": _cores(),
        "memory": _memory(),
        **_accelerator(),
    }
    facts |= {name: _version(name) for name in PACKAGES}
    # Names of variables that change search paths and servers; never their values: some are secrets.
    prefixes = ("HF_", "CUDA_", "PYTORCH_", "NCCL_", "OMP_", "ACCELERATE_", "DIFFALIGN_")
    facts["environment"] = (
        ", ".join(sorted(n for n in os.environ if n.startswith(prefixes))) or "nothing of note"
    )
    return facts


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cores() -> int | None:
    """Return number of cores that this process may use; Linux alone tells which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> str:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # Windows has no sysconf
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _accelerator() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:  # may be the bug that is reported
        return {"accelerator": f"torch cannot be imported: {error}"}
    facts: dict[str, Any] = {"cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return facts | {
            "accelerator": "none"
            if not torch.accelerator.is_available()
            else str(torch.accelerator.current_accelerator())
        }
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        facts[f"accelerator {i}"] = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    return facts
