"""How fast a step is and how much memory it takes, ours and that of a script of diffusers.

    python -m benchmarks.speed                                    # CPU: the mid-size SDXL; GPU: real sizes
    python -m benchmarks.speed --against train_diffusion_dpo_sdxl.py
    python -m benchmarks.speed --arms lora,full --repetitions 1
    python -m benchmarks.speed --pipeline whole --against ...     # SDXL at its real size, on a CPU
    python -m benchmarks.speed --sizes sdxl,flux --steps 20       # real sizes by name, on a GPU

The script (huggingface/diffusers, examples/research_projects/diffusion_dpo) is run as it is, on the same
pipeline folder and the same table of pairs. Repetitions alternate: ours, the script, ours, the script. Each
is a process of its own, whose processor time and peak memory the system tells. A row is a file under
``benchmarks/rows``; rows that are there are not made again, and ``benchmarks/speed.md`` is made of them all.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import record, speed_mid, speed_page, speed_sizes
from benchmarks.arms import NEVER
from benchmarks.record import Row, lock
from benchmarks.speed_arms import SUBJECTS, Arm
from benchmarks.speed_real import SIZES, useful
from diffalign.config.io import to_yaml
from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
)
from diffalign.errors import UserError
from diffalign.estimate.estimate import estimate
from diffalign.models.loading import DTYPES
from diffalign.runs.micro_batch import workload_of
from diffalign.runs.validate import read_run
from diffalign.utils.files import write_atomic

RANK = 16
PRECISIONS: Mapping[str, Literal["no", "bf16"]] = {"float32": "no", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Plan:
    """What every row of a call has in common.

    Attributes:
        folder: of the pipeline, the pairs and the runs.
        steps: optimizer steps.
        batch: pairs a step.
        resolution: side of the images, in pixels.
        threads: of torch.
        script: the path of the script; empty: none.
        different: what the pipeline's configurations have that SDXL's have not.
        dtype: of its weights, in which both tools compute.
        prefix: of the names of rows.
        side: of the matrices whose product measures the peak; None: the usual one.
    """

    folder: Path
    steps: int = 4
    batch: int = 2
    resolution: int = speed_mid.RESOLUTION
    threads: int = 1
    script: str = ""
    different: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: speed_mid.DIFFERENT)
    dtype: str = "float32"
    prefix: str = "speed"
    side: int | None = None


def run_of(plan: Plan, arm: Arm) -> Run:
    """Return our run of an arm, the model and the pairs of which are made if they are not there."""
    model = speed_mid.pipeline(plan.folder / "pipeline", plan.different, DTYPES[plan.dtype])
    count = plan.steps * plan.batch // arm.visits
    table = plan.folder / f"pairs-{count}"
    if not (table / "train.parquet").is_file():
        speed_mid.pairs(table, count, plan.resolution)
    run = Run(
        output=str(plan.folder / "ours"),
        overwrite=True,
        method={"type": "dpo", "beta": 5000.0},
        model=ModelConfig(path=str(model), lora=LoraConfig(rank=RANK), dtype=plan.dtype),
        data=DataConfig(
            path=str(table / "train.parquet"), resolution=plan.resolution, holdout=0.0, cache_batch_size=4
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        training=TrainingConfig(
            steps=plan.steps, batch_size=plan.batch, mixed_precision=PRECISIONS[plan.dtype]
        ),
        logging=LoggingConfig(every=1),
        checkpoint=CheckpointConfig(every=NEVER),
    )
    write_atomic(plan.folder / "run.yaml", to_yaml(run))
    return read_run(str(plan.folder / "run.yaml"), list(arm.flags))


def script_arguments(plan: Plan, run: Run, arm: Arm) -> list[str]:
    """Return the arguments with which the script of diffusers does what a run does."""
    values = {
        "pretrained_model_name_or_path": run.model.path,
        "dataset_name": str(Path(run.data.path).parent),
        "dataset_split_name": "train",
        "output_dir": str(plan.folder / "theirs"),
        "cache_dir": str(plan.folder / "cache"),
        "resolution": plan.resolution,
        "train_batch_size": plan.batch,
        "max_train_steps": plan.steps,
        "checkpointing_steps": NEVER,
        "learning_rate": run.optimizer.learning_rate,
        "lr_warmup_steps": 0,
        "rank": RANK,
        "seed": 0,
        "mixed_precision": PRECISIONS[plan.dtype],
    }
    given = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*given, "--no_hflip", *script_flags(arm)]


def measured(folder: Path, job: Mapping[str, Any]) -> Row:
    """Run a job in a process of its own and return what it took.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    file = folder / "job.json"
    file.with_name("result.json").unlink(missing_ok=True)
    write_atomic(file, json.dumps(job))
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.speed_child", str(file)]
    with (folder / "log.txt").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        text = (folder / "log.txt").read_text(errors="replace")
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{text[-3000:]}")
    result: Row = json.loads(file.with_name("result.json").read_text(encoding="utf-8"))
    return result | {"whole_processor": usage.ru_utime + usage.ru_stime}


def row_of(plan: Plan, arm: Arm, tool: str, repetition: int) -> Row | None:
    """Return the row of an arm, a tool and a repetition, made if it is missing; None if another process is at
    it.
    """
    asked: Row = {
        "arm": arm.name,
        "tool": tool,
        "flags": arm.flags if tool == "ours" else script_flags(arm),
        "steps": plan.steps,
        "batch": plan.batch,
        "resolution": plan.resolution,
        "threads": plan.threads,
        "model": plan.different,
    }
    if plan.dtype != "float32":
        asked["dtype"] = plan.dtype
    if tool == "script":
        asked["script"] = hashlib.sha256(Path(plan.script).read_bytes()).hexdigest()
    name = f"{plan.prefix}-{arm.name}-{tool}-{repetition}"
    if (found := record.known(name, asked)) is not None:
        return found
    run = run_of(plan, arm)
    job = {"kind": tool, "threads": plan.threads, "side": plan.side}
    if tool == "ours":
        job |= {
            "config": str(plan.folder / "run.yaml"),
            "flags": list(arm.flags),
            "unfused": arm.unfused,
        }
    else:
        job |= {"script": plan.script, "arguments": script_arguments(plan, run, arm)}
    with lock("speed", wait=False) as mine:
        if not mine:
            return None
        for left in ("ours", "theirs"):
            shutil.rmtree(plan.folder / left, ignore_errors=True)
        told = estimate(workload_of(run))
        result = measured(plan.folder, job)
        flops = useful(told, reference=not run.data.reference_bank)
        facts = {"repetition": repetition, "warm": arm.warm, "beside": arm.beside, "says": arm.says}
        return record.keep(name, asked, {**facts, "flops_per_pair": flops, **result})


def script_flags(arm: Arm) -> tuple[str, ...]:
    """Return the arguments that an arm adds to the script's."""
    return arm.script or ()


def wanted(arms: Sequence[Arm], repetitions: int, script: bool) -> Iterator[tuple[Arm, str, int]]:
    """Yield arm, tool and repetition, the tools and the arms in turn."""
    for repetition in range(repetitions):
        for arm in arms:
            yield arm, "ours", repetition
            if script and arm.script is not None:
                yield arm, "script", repetition


def main(argv: Sequence[str] | None = None) -> None:
    """Make every row that is wanted and not there, and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="", help="path of diffusers' train_diffusion_dpo_sdxl.py")
    parser.add_argument("--pipeline", choices=list(SUBJECTS), default="mid", help="what is trained on a CPU")
    parser.add_argument("--arms", help="comma-separated; default: all")
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}; default on a GPU: all")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, help="pairs a step; default: 2 of mid, 1 of whole")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, default=record.WORK / "speed", help="of models and runs: 2 GB, 15 of whole"
    )
    arguments = parser.parse_args(argv)
    if arguments.against and not Path(arguments.against).is_file():
        raise UserError(f"--against {arguments.against}: no such file; allowed: the path of a script")
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.sizes or (speed_sizes.on_gpu() and not arguments.arms):
        names = record.chosen(arguments.sizes, list(SIZES))
        for name, arm, repetition in speed_sizes.wanted(names, arguments.repetitions):
            speed_sizes.row_of(folder, name, arm, arguments.steps, arguments.threads, repetition, measured)
            speed_page.write()
        return
    subject = SUBJECTS[arguments.pipeline]
    plan = Plan(
        folder / arguments.pipeline,
        steps=arguments.steps,
        batch=arguments.batch or subject.batch,
        threads=arguments.threads,
        script=str(Path(arguments.against).absolute()) if arguments.against else "",
        different=subject.different,
        dtype=subject.dtype,
        prefix=subject.prefix,
    )
    plan.folder.mkdir(parents=True, exist_ok=True)
    names = record.chosen(arguments.arms, [arm.name for arm in subject.arms])
    chosen = [arm for arm in subject.arms if arm.name in names]
    for arm, tool, repetition in wanted(chosen, arguments.repetitions, bool(plan.script)):
        if row_of(plan, arm, tool, repetition) is not None:
            print(f"{arm.name} {tool} {repetition}", flush=True)
            speed_page.write()


if __name__ == "__main__":
    main()
