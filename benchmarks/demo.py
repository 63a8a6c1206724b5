"""Run the demo with three seeds, and its controls: SFT on the winners, and flipped labels, which must lose.

    python -m benchmarks.demo --output runs/benchmark-demo

Writes ``benchmarks/demo.json`` and ``demo.md``, and resumes after an interruption. All runs have the same
held-out prompts and noise.
"""

import argparse
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffalign.runs.demo import REWARDS, DemoOptions, demo
from diffalign.utils.files import write_atomic

VARIANTS = {
    "Diffusion-DPO": {"recipe": "tiny_sdxl_dpo"},
    "labels turned round": {"recipe": "tiny_sdxl_dpo", "flip_labels": True},
    "SFT on winners": {"recipe": "tiny_sdxl_sft"},
}
HERE = Path(__file__).parent


def main() -> None:
    """Run every variant with every seed; write the record after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-demo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=512)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.demo --seeds {arguments.seeds} --prompts {arguments.prompts}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "runs": [],
    }
    if (HERE / "demo.json").exists():  # continue a record that was made by the same command
        known = json.loads((HERE / "demo.json").read_text(encoding="utf-8"))
        record = known if known["command"] == record["command"] else record
    done_before = {(run["variant"], run["seed"]) for run in record["runs"]}
    for seed in range(arguments.seeds):
        for name, options in VARIANTS.items():
            if (name, seed) in done_before:
                continue
            folder = arguments.output / f"{name.replace(' ', '-').lower()}-{seed}"
            done = demo(DemoOptions(output=str(folder), seed=seed, prompts=arguments.prompts, **options))
            kept = (
                "base",
                "aligned",
                "gain",
                "gain_ci95",
                "win_rate",
                "win_rate_ci95",
                "train_seconds",
                "steps",
                "alarm",
            )
            others = {r: [done["rewards"][r]["base"], done["rewards"][r]["aligned"]] for r in REWARDS[1:]}
            record["runs"].append(
                {"variant": name, "seed": seed, **{k: done[k] for k in kept}, "not trained on": others}
            )
            record["versions"] = done["versions"]
            write_atomic(HERE / "demo.json", json.dumps(record, indent=2) + "\n")
            write_atomic(HERE / "demo.md", table(record))
            shutil.rmtree(folder / "cache")


def table(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    lines = [
        "# The demo, three seeds and controls",
        "",
        f"`{record['command']}`, {record['machine']}, {record['date']}. Gain of the judge on "
        "held-out prompts with its 95 % interval (paired bootstrap over prompts); the same noise for both.",
        "",
        "| | seed | judge | gain | win rate | taste | tiny CLIP | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(record["runs"], key=lambda run: (list(VARIANTS).index(run["variant"]), run["seed"])):
        low, high = run["gain_ci95"]
        taste, clip = (f"{a:.3f} -> {b:.3f}" for a, b in run["not trained on"].values())
        lines.append(
            f"| {run['variant']} | {run['seed']} | {run['base']:.3f} -> {run['aligned']:.3f} | "
            f"{run['gain']:+.3f} [{low:+.3f}, {high:+.3f}] | {run['win_rate']:.1%} | {taste} | {clip} | "
            f"{run['steps']} steps, {run['train_seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
