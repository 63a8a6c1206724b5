"""Time a complete evaluation on a small machine, uninterrupted and resumed, and compare the two reports.

    python -m benchmarks.evaluation

Aligns the tiny SDXL twice (Diffusion-DPO, and SFT on the winners) unless the runs exist. Then runs
``diffalign evaluate`` of the base against both, with three rewards on 200 prompts: once uninterrupted, and
once interrupted (as by Ctrl-C) after half of the images and run again. Writes ``benchmarks/evaluation.json``
and ``evaluation.md``.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record import WORK
from diffalign.evaluation.report.report import package_versions
from diffalign.utils.files import write_atomic

HERE = Path(__file__).parent
RECIPES = {"dpo": "tiny_sdxl_dpo", "sft": "tiny_sdxl_sft"}
REWARDS = "judge,taste,tiny_clip"
MODELS = 3  # models that sample, the base included


def main() -> None:
    """Align, evaluate both ways, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--training-steps", type=int, default=30)
    parser.add_argument("--work", type=Path, default=WORK / "evaluation", help="runs and images")
    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder of evaluation.json and evaluation.md"
    )
    arguments = parser.parse_args()
    aligned = [align(arguments.work / name, recipe, arguments) for name, recipe in RECIPES.items()]
    command = [
        *("evaluate", "--base", "tiny:sdxl", "--aligned", ",".join(map(str, aligned))),
        *("--prompts", "tiny:test", "--limit", str(arguments.prompts), "--rewards", REWARDS),
        *("--steps", str(arguments.sampling_steps), "--guidance", "1", "--batch-size", "32"),
    ]
    whole, broken = arguments.work / "whole", arguments.work / "broken"
    for folder in (whole, broken):
        shutil.rmtree(folder, ignore_errors=True)
    seconds = {"without a break": timed([*command, "--output", str(whole)])}
    half = MODELS * arguments.prompts // 2
    seconds["until it was interrupted"] = timed([*command, "--output", str(broken)], broken, half)
    before = written(broken)
    seconds["resumed"] = timed([*command, "--output", str(broken)])
    after = written(broken)
    record = {
        "command": "python -m benchmarks.evaluation",
        "evaluation": f"diffalign {' '.join(command)}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "prompts": arguments.prompts,
        "models": [path.name for path in aligned],
        "rewards": REWARDS.split(","),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "images when interrupted": len(before),
        "images drawn twice": sum(after[name] != stamp for name, stamp in before.items()),
        "images": len(after),
        "the reports are the same": report(whole) == report(broken),
        "verdict": report(broken)["headline"],
        "versions": package_versions(),
    }
    write_atomic(arguments.output / "evaluation.json", json.dumps(record, indent=2) + "\n")
    write_atomic(arguments.output / "evaluation.md", table(record))
    print(table(record))


def align(folder: Path, recipe: str, arguments: argparse.Namespace) -> Path:
    """Return the run directory of a recipe, training it first if needed."""
    if not (folder / "aligned").is_dir():
        steps = str(arguments.training_steps)
        timed(["train", recipe, "--output", str(folder), "--training.steps", steps, "--overwrite", "true"])
    return folder


def timed(argv: list[str], folder: Path | None = None, images: int = 0) -> float:
    """Return the seconds of a diffalign command; interrupt it when ``folder`` has ``images`` images."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "diffalign", *argv], stdout=subprocess.DEVNULL)
    try:
        if folder is not None:
            while process.poll() is None and len(written(folder)) < images:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
        status = process.wait()
    finally:
        process.kill()
    expected = 0 if folder is None else 130
    if status != expected:
        raise SystemExit(f"{' '.join(argv)} ended with status {status}, not {expected}")
    return time.perf_counter() - begin


def written(folder: Path) -> dict[str, int]:
    """Return the time at which each image of an evaluation was written, in nanoseconds."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.glob("images/*/*.png")}


def report(folder: Path) -> dict[str, Any]:
    """Return the results of an evaluation."""
    results: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return results


def table(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    seconds, images = record["seconds"], record["images"]
    total = seconds["until it was interrupted"] + seconds["resumed"]
    same = "the same" if record["the reports are the same"] else "NOT the same"
    return "\n".join(
        [
            "# A whole evaluation, interrupted once and resumed",
            "",
            f"`{record['command']}`, {record['machine']}, {record['date']}. The tiny SDXL against "
            f"{len(record['models'])} aligned models ({', '.join(record['models'])}) by "
            f"{len(record['rewards'])} rewards ({', '.join(record['rewards'])}) on {record['prompts']} "
            f"prompts: `{record['evaluation']}`",
            "",
            "| | seconds |",
            "|---|---|",
            *(f"| {name} | {value:.0f} |" for name, value in seconds.items()),
            f"| **interrupted and resumed, together** | **{total:.0f}** |",
            "",
            f"It was interrupted with {record['images when interrupted']} of {images} images drawn; "
            f"{record['images drawn twice']} of them were drawn again, and the report is {same} as that of "
            "the evaluation without a break, to the last digit. Starting Python and loading the models is "
            f"part of each. Its verdict: {record['verdict']}",
            "",
        ]
    )


if __name__ == "__main__":
    main()
