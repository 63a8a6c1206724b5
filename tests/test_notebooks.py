"""The notebooks run unchanged at a smaller size, and are stored with their outputs."""

import re
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What is set to less, as it is assigned, and flags of runs.
FEWER = {
    "STEPS, PROMPTS, PAIRS": "2, 6, 8",
    "STEPS, PROMPTS": "3, 8",
    "STEPS, PICTURES": "6, 8",
    "PROMPTS, EACH": "4, 4",
}
FLAGS = {"data.limit": 48, "training.batch_size": 4}
# What is seen in any run of them; text/html is the grid of a comparison.
SEEN = {
    "bring_your_own_pairs": (
        "pairs, 0 ties, 0 rows without label",
        "lora_unet_input_blocks",
        "of a pixel: 0 of 255",
    ),
    "compare_methods": ("text/html", "dpo, flipped: ", "drawn by all models from the same noise"),
    "load_in_diffusers": (
        "pytorch_lora_weights.safetensors",
        "merged against LoRA: 0.0",
        "base against LoRA: ",
    ),
    "score_your_folder": ("tiny_clip  16 ", "pairs of 16 images of 4 prompts"),
    "what_a_reward_likes": ("judge      right  1.00",),
    "what_dpo_does": ("text/html", "loss 0.693147"),
}


def shortened(notebook):
    """Return the notebook with fewer steps."""
    for cell in notebook.cells:
        for names, values in FEWER.items():
            cell.source = re.sub(rf"^({names}) = [\d, ]+$", rf"\1 = {values}", cell.source, flags=re.M)
        for flag, value in FLAGS.items():
            cell.source = re.sub(rf"--{re.escape(flag)}=\d+", f"--{flag}={value}", cell.source)
        cell.source = cell.source.replace(
            'read_run("tiny_sdxl_dpo")', 'read_run("tiny_sdxl_dpo", ["--data.limit=64"])'
        )
    return notebook


def outputs(notebook):
    """Of all cells, in order."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts(notebook):
    """Return the text of the outputs, images by their type alone."""
    said = []
    for output in outputs(notebook):
        said += [output.get("text", ""), *output.get("data", {})]
        said += [text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(said)


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    saved = nbformat.read(path, as_version=4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(
        shortened(nbformat.read(path, as_version=4)), timeout=300, kernel_name="python3"
    )
    done = client.execute(cwd=str(tmp_path))
    shown = texts(done)
    for words in SEEN[path.stem]:
        assert words in shown, words
    assert pictures(done) == pictures(saved)
    assert not list(tmp_path.iterdir()), "a notebook leaves nothing where it was opened"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_saved_with_what_they_show(path):
    notebook = nbformat.read(path, as_version=4)
    assert pictures(notebook) >= 2
    assert all(
        output.output_type != "error" and output.get("name") != "stderr" for output in outputs(notebook)
    )
    assert not re.search(r"/(work|tmp|home|root)/", texts(notebook)), "a path of the machine it was run on"
    assert 'pip install -e ".[notebook]"' in notebook.cells[0].source, "what it needs"
    last = notebook.cells[-1]
    assert last.cell_type == "markdown" and "real" in last.source
