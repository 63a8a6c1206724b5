"""People as the judge of an online run: `diffalign train` serves the page of each round, and goes on by
itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image

from diffalign.rewards import load


@pytest.mark.slow
def test_rounds_are_labelled_by_the_page(tmp_path):
    """Two rounds of D3PO on the tiny SDXL, labelled by HTTP as the page does, in one call of the command."""
    run = tmp_path / "run"
    options = (
        "--rollout.by people --rollout.rewards [] --rollout.page_port 0 --rollout.prompts_per_round 2 "
        "--rollout.samples 2 --rollout.steps 3 --rollout.trained_steps 0.67 --training.batch_size 2 "
        "--training.accumulation 1 --training.steps 4 --checkpoint.every 2 --validation.every 0"
    )
    command = [sys.executable, "-m", "diffalign", "train", "tiny_sdxl_d3po", *options.split()]
    command += ["--output", str(run)]
    errors = (tmp_path / "errors.txt").open("w")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    judge = load("judge")
    rounds = []
    try:
        for _ in range(2):
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), Path(errors.name).read_text()
            folder = max((run / "rollouts").glob("round-*"))
            rounds.append(folder)
            while True:
                task = httpx.get(f"{address}api/state", params={"by": "anna"}).json()["task"]
                number = int(task["key"].partition("-")[0])
                images = [Image.open(folder / f"{number:04d}-{k}.png").convert("RGB") for k in range(2)]
                best = int(judge(images, [task["prompt"]] * 2).argmax())
                places = [int(url.rpartition("/")[2]) for url in task["media"]]
                body = {"by": "anna", "task": task["key"], "choice": places.index(best)}
                state = httpx.post(f"{address}api/answer", json=body).json()
                if state["done"] == state["total"]:
                    break
        assert process.wait(300) == 0, Path(errors.name).read_text()
    finally:
        process.kill()
        process.wait()
        errors.close()
    assert [folder.name for folder in rounds] == ["round-000000", "round-000001"]
    assert (run / "aligned").is_dir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 4
