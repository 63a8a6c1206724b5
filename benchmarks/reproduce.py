"""FLOPs and hours of the published recipes: ``python -m benchmarks.reproduce`` writes ``reproduce.json``.

A network sample without gradient costs a forward (of the network with its adapters, where it has some); one
with gradient a forward, a backward and, with gradient checkpointing, a second forward, as ``diffalign
estimate`` counts them. How many a recipe takes is in ``docs/_reproduce.yaml``. Autoencoder, text encoders and
rewards are left out. Nothing is measured: the hours are those of an H100 (989 TFLOP/s in bf16) that is used
to 40 %, the default of ``diffalign estimate``.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign.config.files import shipped_configs
from diffalign.config.schema import Run
from diffalign.runs.validate import read_run
from diffalign.utils.files import write_atomic

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "reproduce.json"
TFLOPS, UTILISATION = 989, 0.4


def written() -> dict[str, Any]:
    """Return what is written by hand: sources, and the published recipes by name."""
    text = (ROOT / "docs" / "_reproduce.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def units(run: Run, work: Mapping[str, Any]) -> tuple[list[int], str]:
    """Return the factors of the number of units that a recipe trains on, and their names."""
    if "units" in work:
        return list(work["units"]), str(work["counted"])
    training = run.training
    factors = [training.steps, int(work["processes"]), training.batch_size, training.accumulation]
    return factors, "steps x processes x batch x accumulation"


def flops(cost: Mapping[str, int], work: Mapping[str, Any], count: int) -> float:
    """Return the FLOPs of ``count`` units.

    Args:
        cost: FLOPs of one sample: forward, policy (a forward with adapters), backward, recomputation.
    """
    gradient = cost["policy"] + cost["backward"] + cost["recomputation"]
    return count * float(work["with"] * gradient + work["without"] * cost["policy"])


def hours(total: float) -> float:
    """Return the hours of one H100."""
    return total / (TFLOPS * 1e12 * UTILISATION) / 3600


def row(name: str, work: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of one recipe."""
    from diffalign.estimate.estimate import estimate
    from diffalign.runs.micro_batch import workload_of

    run = read_run(shipped_configs()[name])
    one = estimate(workload_of(run))
    cost = {
        "policy": one.policy_flops,
        "backward": one.backward_flops,
        "recomputation": one.policy_flops if run.model.gradient_checkpointing else 0,
    }
    factors, named = units(run, work)
    total = flops(cost, work, math.prod(factors))
    return {"cost": cost, "factors": factors, "counted": named, "flops": total, "h100_hours": hours(total)}


def main() -> None:
    """Count all recipes and write them down."""
    rows = {}
    for name, entry in written()["recipes"].items():
        rows[name] = row(name, entry["work"])
        print(f"{name:<20} {rows[name]['flops']:.3g} FLOP, {rows[name]['h100_hours']:.3g} hours", flush=True)
    about = {"command": "python -m benchmarks.reproduce", "tflops": TFLOPS, "utilisation": UTILISATION}
    write_atomic(RESULT, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
