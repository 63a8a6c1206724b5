"""The demo, shortened: what it writes, and that its controls and self-sampled pairs run."""

import html
import json
import re

import pyarrow.parquet as pq
import pytest
import torch

from diffalign import tiny
from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.export.job import Export, export
from diffalign.models.loading import load
from diffalign.models.lora_formats import read_lora
from diffalign.runs.demo import DemoOptions, demo, sample_pairs
from diffalign.runs.validate import read_run

KEYS = {
    "method", "prompts", "base", "aligned", "gain", "gain_ci95", "win_rate", "win_rate_ci95", "train_seconds",
    "steps", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setattr(tiny, "pairs_path", lambda: first_rows(folder))
    said = []
    data = demo(DemoOptions(output=str(folder / "run"), steps=2, prompts=8), said.append)
    patch.undo()
    return folder / "run", data, said


def first_rows(folder):
    path = folder / "few.parquet"
    if not path.exists():
        pq.write_table(pq.read_table(tiny.WEIGHTS / "pairs.parquet").slice(0, 80), path)
    return path


def test_the_report_says_what_the_issue_asks(short):
    folder, data, said = short
    assert json.loads((folder / "report.json").read_text()).keys() == data.keys() >= KEYS
    assert data["prompts"] == 8 and data["steps"] == 2 and data["method"] == "dpo"
    assert data["gain"] == pytest.approx(data["aligned"] - data["base"])
    assert set(data["rewards"]) == {"judge", "taste", "tiny_clip"}
    assert data["gain_ci95"][0] <= data["gain"] <= data["gain_ci95"][1]
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?:""", page)  # settings may name addresses
    assert "data:image/png;base64" in page
    assert (folder / "comparison.png").is_file() and (folder / "aligned" / "README.md").is_file()
    assert any("held-out pairs" in line for line in said)


def test_the_report_says_how_each_program_loads_the_result(short):
    folder, _, _ = short
    page = html.unescape((folder / "report.html").read_text())
    assert f'pipeline.load_lora_weights("{folder / "aligned"}")' in page
    assert f"diffalign export {folder} --to kohya --output {folder / 'run.safetensors'}" in page
    for words in ("ComfyUI: put run.safetensors into models/loras", "A1111, Forge: put", "kohya's scripts: "):
        assert words in page, words


def test_its_adapter_goes_to_kohyas_layout_and_back_to_the_same_weights(short, tmp_path):
    folder, _, _ = short
    base, quiet = read_run(folder / "config.yaml").model, lambda line: None
    path = export(base, folder / "aligned", Export("kohya", tmp_path / "x.safetensors"), say=quiet)
    back = export(base, path, Export("diffusers", tmp_path / "back"), say=quiet)
    model = load(base)
    ours, kohya, again = (read_lora(one, model)[0]["unet"] for one in (folder / "aligned", path, back))
    assert len(ours) > 10 and ours.keys() == kohya.keys() == again.keys()
    for name, factors in ours.items():
        assert factors.product().abs().max() > 0
        assert torch.equal(kohya[name].product(), factors.product())
        assert torch.equal(again[name].product(), factors.product())


def test_held_out_prompts_are_in_no_pair():
    captions = set(pq.read_table(tiny.pairs_path(), columns=["caption"])["caption"].to_pylist())
    held_out = tiny.prompts("test", 1024)
    assert len(set(held_out)) == 1024 and not captions & set(held_out)


def test_self_sampled_pairs_are_best_against_worst(tmp_path):
    path = sample_pairs(
        ModelConfig(path="tiny:sdxl"), tiny.prompts("train", 6), tmp_path / "pairs.parquet", 0, candidates=2
    )
    rows = pq.read_table(path).to_pylist()
    assert [row["caption"] for row in rows] == tiny.prompts("train", 6)
    assert all((row["label_0"], row["label_1"]) in {(1.0, 0.0), (0.5, 0.5)} for row in rows)


def test_only_tiny_recipes():
    with pytest.raises(UserError, match="allowed in the demo: the tiny recipes"):
        demo(DemoOptions(recipe="sdxl_dpo"))
    with pytest.raises(UserError, match="tiny:wan', a model of videos; allowed in the demo"):
        demo(DemoOptions(recipe="tiny_wan_dpo"))
