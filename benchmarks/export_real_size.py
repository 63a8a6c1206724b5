"""Measure single-file export and import of an SDXL of real size with random weights: time, peak memory.

    python -m benchmarks.export_real_size --folder /somewhere/with/15GB

The pipeline folder is built once (bfloat16, ``sdxl_real_size.build``), a LoRA of every attention projection
is made up, and two processes follow: one merges the LoRA and writes the single file, one reads the file
with diffusers (configurations from the folder: no network). Of each the largest resident set is recorded,
and the part of it that is the process's own (anonymous): pages of a mapped file count as resident though
they are only cache. The result goes to ``benchmarks/export_real_size.json`` and ``.md``.
"""

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).with_suffix("")
LIMIT = 1.3


class Peak:
    """The peak memory of this process inside the context, in bytes."""

    def __init__(self) -> None:
        self.anonymous = self.resident = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {
                line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")
            }
            self.anonymous = max(self.anonymous, found["RssAnon"])
            self.resident = max(self.resident, found["VmRSS"])


def make(folder: Path) -> None:
    """Build the pipeline, and a LoRA of rank 4 on its attention."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    from benchmarks.sdxl_real_size import build
    from diffalign.models.families.sdxl import CONFIGS

    build(folder / "pipeline")
    if (folder / "lora" / "pytorch_lora_weights.safetensors").is_file():
        return
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS["unet"])
    state = {}
    for name, module in unet.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            weight: Any = module.weight
            state[f"unet.{name}.lora_A.weight"] = torch.randn(4, weight.shape[1]) / 30
            state[f"unet.{name}.lora_B.weight"] = torch.randn(weight.shape[0], 4) / 30
    (folder / "lora").mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "lora" / "pytorch_lora_weights.safetensors")


def export(folder: Path) -> dict[str, Any]:
    """Merge and write the single file; return time and memory."""
    from diffalign.config.schema import ModelConfig
    from diffalign.export.job import Export
    from diffalign.export.job import export as write

    file = folder / "single.safetensors"
    base = ModelConfig(path=str(folder / "pipeline"), dtype="bfloat16")
    with Peak() as peak:
        start = time.monotonic()
        write(base, folder / "lora", Export("single-file", file, overwrite=True), say=lambda line: None)
        seconds = time.monotonic() - start
    return _row(file, peak, seconds)


def read(folder: Path) -> dict[str, Any]:
    """Read the single file; return time, memory, and whether a merged weight equals W + B A."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from safetensors import safe_open

    file = folder / "single.safetensors"
    with Peak() as peak:
        start = time.monotonic()
        pipeline = StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(folder / "pipeline"), torch_dtype=torch.bfloat16
        )
        for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
            for parameter in getattr(pipeline, component).parameters():
                parameter.sum()  # weights of a mapped file are in memory once they are used
        seconds = time.monotonic() - start
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    (weights,) = (folder / "pipeline" / "unet").glob("*.safetensors")
    with safe_open(weights, framework="pt") as handle:
        before = handle.get_tensor(f"{name}.weight").float()
    with safe_open(folder / "lora" / "pytorch_lora_weights.safetensors", framework="pt") as handle:
        up = handle.get_tensor(f"unet.{name}.lora_B.weight")
        down = handle.get_tensor(f"unet.{name}.lora_A.weight")
    expected = (before + up @ down).to(torch.bfloat16)
    assert torch.equal(pipeline.unet.get_submodule(name).weight, expected)
    return _row(file, peak, seconds)


def _row(file: Path, peak: Peak, seconds: float) -> dict[str, Any]:
    size = file.stat().st_size
    return {
        "file_gib": round(size / 2**30, 3),
        "peak_anonymous_gib": round(peak.anonymous / 2**30, 3),
        "peak_resident_gib": round(peak.resident / 2**30, 3),
        "anonymous_over_file": round(peak.anonymous / size, 3),
        "resident_over_file": round(peak.resident / size, 3),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Build, export and import, each in its own process; write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--stage", choices=["make", "export", "read"], help="one stage, in this process")
    args = parser.parse_args()
    if args.stage:
        row = {"make": make, "export": export, "read": read}[args.stage](args.folder)
        print(json.dumps(row))
        return
    rows = {}
    for stage in ("make", "export", "read"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.export_real_size",
            "--folder",
            str(args.folder),
            "--stage",
            stage,
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[stage] = json.loads(done.stdout.splitlines()[-1])
        print(stage, rows[stage], flush=True)
    record = {
        "command": "python -m benchmarks.export_real_size --folder FOLDER",
        "machine": f"CPU, {platform.machine()}",
        "date": datetime.now(UTC).date().isoformat(),
        "export": rows["export"],
        "import": rows["read"],
    }
    HERE.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    HERE.with_suffix(".md").write_text(_table(record), encoding="utf-8")


def _table(record: dict[str, Any]) -> str:
    lines = [
        "# An SDXL of the real size as a single file\n",
        f"`{record['command']}`, {record['machine']}, {record['date']}; random bfloat16 weights. Limit: "
        f"{LIMIT} times the file. Own memory leaves out pages of mapped files, which are cache.\n",
        "| | file, GiB | peak of own memory, GiB | over file | peak resident, GiB | over file | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("export", "import"):
        row = record[name]
        lines.append(
            f"| {name} | {row['file_gib']} | {row['peak_anonymous_gib']} | {row['anonymous_over_file']} | "
            f"{row['peak_resident_gib']} | {row['resident_over_file']} | {row['seconds']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
