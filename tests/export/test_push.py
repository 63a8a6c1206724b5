"""Pushes to a local fake of the hub, in processes of their own: the client reads HF_ENDPOINT on import."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from diffalign.config.io import to_yaml
from diffalign.config.schema import LoraConfig, ModelConfig, Run
from diffalign.evaluation.drawing.samples import write_manifest
from diffalign.export.aligned import save_aligned
from diffalign.models.loading import load
from diffalign.models.lora import add_lora
from diffalign.runs.exporting import gains
from diffalign.runs.publish import _pictures
from tests.export.fake_hub import Hub, running
from tests.tiny_pipelines import make_sd15

TOKEN = "hf_" + "secretsecretsecret"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run directory as training leaves it."""
    root = tmp_path_factory.mktemp("run")
    base = make_sd15(root / "base")
    out = root / "mine"
    run = Run(output=str(out), model=ModelConfig(path=str(base), lora=LoraConfig(rank=2)))
    model = load(run.model)
    add_lora(model.network, run.model.lora)
    save_aligned(model, out / "aligned", "old card")
    (out / "config.yaml").write_text(to_yaml(run))
    summary = {"steps": 7, "data": "3 pairs", "held_out": {"accuracy": 0.75}, "versions": {"torch": "2.9"}}
    (out / "summary.json").write_text(json.dumps(summary))
    reward = {"gain": 0.1, "gain_ci95": [0.08, 0.12]}
    report = {"prompts": 512, "rewards": {"judge": reward}, "models": {"aligned": {}}}
    (out / "report.json").write_text(json.dumps(report))
    samples = out / "samples" / "step-000007"
    samples.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(samples / "a.png")
    row = {"prompt": "a red circle", "position": 0, "number": 0, "seed": 1, "file": "a.png"}
    write_manifest(samples, [row], 0, 1)
    return out


SCRIPT = """
import sys
from pathlib import Path
from diffalign.errors import UserError
from diffalign.export.hub import base_license, push_folder
for repo in ("me/forbidden", "mine", "me/mine", "me/mine"):
    try:
        print(push_folder(Path(sys.argv[1]), repo))
    except UserError as error:
        print("refused:", error)
print(base_license("a/licensed"), base_license("a/unknown"))
"""


def outside(hub: Hub, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the fake as the hub; the token must not be in what it prints."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_a_run_arrives_with_its_card_and_pictures(hub: Hub, finished: Path) -> None:
    options = ("--private", "--revision", "two", "--license", "openrail")
    done = outside(hub, "-m", "diffalign", "push", str(finished), "me/mine", *options)
    assert done.stdout.strip() == f"{hub.url}/me/mine/tree/two"
    asked = hub.repos["me/mine"]
    assert (asked.get("private") is True or asked.get("visibility") == "private") and hub.branches == [
        "me/mine@two"
    ]
    assert set(hub.files) == {"README.md", "pytorch_lora_weights.safetensors", "images/0.png"}
    weights = (finished / "aligned" / "pytorch_lora_weights.safetensors").read_bytes()
    assert hub.objects[hub.files["pytorch_lora_weights.safetensors"]] == weights
    card = hub.files["README.md"]
    matter = yaml.safe_load(card.split("---\n")[1])
    assert {"lora", "diffusers", "text-to-image"} <= set(matter["tags"]) and matter["license"] == "openrail"
    assert matter["widget"] == [{"text": "a red circle", "output": {"url": "images/0.png"}}]
    assert "| accuracy | 0.75 |" in card and "| optimizer steps | 7 |" in card
    assert "| gain of judge over the base | +0.100 (95 % interval +0.080 to +0.120), 512 prompts" in card
    assert "## Versions\n\ntorch 2.9\n" in card
    assert "Wallace et al." in card and "https://arxiv.org/abs/2311.12908" in card
    assert TOKEN not in card and all(TOKEN not in request for request in hub.requests)
    assert (finished / "aligned" / "README.md").read_text() == "old card"


def test_a_push_that_was_cut_short_goes_on_and_refusals_say_what_to_do(hub: Hub, finished: Path) -> None:
    hub.refuse_commits, hub.licenses = 1, {"a/licensed": "mit"}
    lines = outside(hub, "-c", SCRIPT, str(finished / "aligned")).stdout.splitlines()
    assert lines[0].startswith("refused: me/forbidden") and "hf auth login" in lines[0]
    assert "allowed: ORG/NAME" in lines[1]
    assert lines[2].startswith("refused: me/mine") and "diffalign push" in lines[2]
    assert lines[3] == f"{hub.url}/me/mine" and hub.puts == 1
    assert "pytorch_lora_weights.safetensors" in hub.files
    assert lines[4] == "mit None"


def test_training_pushes_what_it_leaves_at_its_end(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    flags = {
        "output": out,
        "data.limit": 12,
        "data.holdout": 0.25,
        "training.steps": 1,
        "training.batch_size": 2,
        "export.push_to_hub": "me/mine",
        "export.private": "true",
    }
    pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = outside(hub, "-m", "diffalign", "train", "tiny_sd15_dpo", *pairs)
    assert f"on the hub: {hub.url}/me/mine" in done.stderr
    weights = (out / "aligned" / "pytorch_lora_weights.safetensors").read_bytes()
    assert hub.objects[hub.files["pytorch_lora_weights.safetensors"]] == weights
    assert "| optimizer steps | 1 |" in hub.files["README.md"]
    for file in (*out.rglob("*.yaml"), *out.rglob("*.json*"), *out.rglob("*.md")):
        assert TOKEN not in file.read_text(encoding="utf-8"), file


def test_pictures_are_those_of_the_evaluation_where_no_validation_drew_any(tmp_path: Path) -> None:
    aligned = tmp_path / "run" / "images" / "aligned"
    aligned.mkdir(parents=True)
    rows = []
    for position in range(6):
        Image.new("RGB", (8, 8), "red").save(aligned / f"{position}.png")
        rows.append(
            {
                "prompt": f"p{position}",
                "position": position,
                "number": 0,
                "seed": 1,
                "file": f"{position}.png",
            }
        )
    write_manifest(aligned, rows, 0, 1)
    chosen = _pictures(tmp_path / "run", tmp_path / "into")
    assert chosen == [(f"p{n}", f"{n}.png") for n in range(4)]
    assert all((tmp_path / "into" / name).is_file() for _, name in chosen)
    assert _pictures(tmp_path / "none", tmp_path / "other") == []


def test_a_report_on_several_models_says_nothing_of_one() -> None:
    reward = {"gain": 0.1, "gain_ci95": [0.08, 0.12]}
    report = {"prompts": 9, "rewards": {"judge": reward}, "models": {"a": {}, "b": {}}}
    assert gains(report) == {} and gains({}) == {}
