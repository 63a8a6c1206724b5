"""Commands on a tiny random SDXL: their output files and messages."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.cli import main


@pytest.fixture(autouse=True)
def here(world, monkeypatch):
    monkeypatch.chdir(world)


def test_train_says_where_things_are_and_how_to_go_on(tmp_path, capsys):
    output = str(tmp_path / "run")
    assert main(["train", "good.yaml", "--output", output, "--max_train_steps", "1"]) == 0
    said = capsys.readouterr().err
    assert "3 pairs, 1 tie" in said
    assert f"diffalign evaluate --run {output}" in said
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "aligned/pytorch_lora_weights.safetensors",
        "aligned/README.md",
    ):
        assert (tmp_path / "run" / name).is_file(), name


def test_the_lines_that_it_prints_load_the_result(world, tmp_path, capsys):
    assert main(["train", "good.yaml", "--output", str(tmp_path / "run"), "--max_train_steps", "1"]) == 0
    said = capsys.readouterr().err.split("load it in diffusers:\n")[1].split("\n\nmeasure the gain")[0]
    lines = [line.strip() for line in said.splitlines()]
    assert lines[-1] == 'image = pipeline("a lighthouse at dusk").images[0]'
    # A process without diffalign: only the lines, from another folder than the checkout.
    code = "\n".join([*lines[:-1], "print(type(pipeline).__name__, list(pipeline.unet.peft_config))"])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=world, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "StableDiffusionXLPipeline" and "default" in done.stdout


def test_an_interrupted_run_is_130_and_says_how_to_continue(finished, monkeypatch, capsys):
    from diffalign.runs import align as job

    for folder, words in ((finished, f"{finished}/config.yaml"), (Path("a run"), "'a run/config.yaml'")):
        stopped = job.Result(folder, None, 1, 1.0, True, "", "")
        monkeypatch.setattr(job, "align", lambda run, stopped=stopped: stopped)
        assert main(["train", "good.yaml"]) == 130
        assert f"diffalign train {words} --resume latest" in capsys.readouterr().err


def test_printed_commands_quote_a_path_with_spaces(tmp_path):
    """A line that is printed is pasted into a shell."""
    from diffalign.export.programs import how_to_load, trained_lora

    (command,) = (line for line in trained_lora(Path("my run"), "sd15") if line.startswith("diffalign"))
    words = ["diffalign", "export", "my run", "--to", "kohya", "--output", "my run/my run.safetensors"]
    assert shlex.split(command) == words
    assert "--network_weights 'my run.safetensors'" in "\n".join(
        how_to_load("kohya", Path("my run.safetensors"), "sd15")
    )


def test_resume_latest_continues_to_more_steps(world, tmp_path, capsys):
    import shutil

    run = str(tmp_path / "run")
    assert main(["train", "good.yaml", "--output", run]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    assert main(["train", f"{run}/config.yaml", "--resume", "latest"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir() and rows


def test_print_config_trains_nothing_and_loads_again(tmp_path, capsys):
    from diffalign.runs.validate import read_run

    assert main(["train", "tiny_sdxl_dpo", "--training.steps", "3", "--print-config"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert read_run(tmp_path / "again.yaml") == read_run("tiny_sdxl_dpo", ["--training.steps=3"])


def test_cache_fills_what_train_then_finds(tmp_path, capsys):
    flags = ["--data.cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    assert main(["cache", "good.yaml", *flags]) == 0
    assert capsys.readouterr().out.startswith("3 pairs, 1 tie")
    written = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*") if f.is_file()}
    assert sum(f.suffix == ".arrow" for f in written) == 4  # latents, text, the manifest and its part
    assert main(["train", "good.yaml", *flags, "--training.steps", "1"]) == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*") if f.is_file()} == written


def test_a_cache_may_lie_at_an_address(tmp_path, monkeypatch, capsys):
    import fsspec

    from diffalign.runs.validate import read_run

    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "copies"))
    memory, address = fsspec.filesystem("memory"), "memory://bucket/cache"
    flags = ["--data.cache_dir", address, "--output", str(tmp_path / "run"), "--data.rewards", "jpeg"]
    try:
        assert main(["cache", "good.yaml", *flags]) == 0
        assert f"the cache is {address}" in capsys.readouterr().err
        written = memory.find("/bucket/cache")
        assert sum(name.endswith(".arrow") for name in written) == 4
        assert len(list((tmp_path / "copies").rglob("scores.sqlite"))) == 1  # a database needs a disk
        assert main(["train", "good.yaml", *flags, "--training.steps", "1"]) == 0
        assert memory.find("/bucket/cache") == written
    finally:
        memory.rm("/bucket", recursive=True)
    assert read_run(tmp_path / "run" / "config.yaml").data.cache_dir == address


DRAW = ["--prompts", "prompts.txt", "--steps", "2", "--height", "16", "--width", "16"]


def test_generate_is_resumable_and_ignores_the_batch_size(finished, tmp_path, capsys):
    output = tmp_path / "images"
    for _ in range(2):
        assert main(["generate", "run", *DRAW, "--images-per-prompt", "2", "--output", str(output)]) == 0
        files = sorted(output.glob("*.png"))
        assert len(files) == 4
    other = tmp_path / "other"
    argv = [
        "generate",
        "run/aligned",
        *DRAW,
        "--images-per-prompt",
        "2",
        "--output",
        str(other),
        "--batch-size",
        "1",
    ]
    assert main(argv) == 0
    assert [f.name for f in sorted(other.glob("*.png"))] == [f.name for f in files]


def test_processes_share_the_images(tmp_path, monkeypatch):
    argv = ["generate", "model", *DRAW, "--images-per-prompt", "2", "--output", str(tmp_path / "images")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, drawn in (("0", 2), ("1", 4)):
        monkeypatch.setenv("RANK", rank)
        assert main(argv) == 0
        assert len(list((tmp_path / "images").glob("*.png"))) == drawn


def test_score_writes_a_table_and_prints_means(tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    argv = [
        "score",
        "pairs.parquet",
        "--rewards",
        "jpeg,jpeg_incompressibility",
        "--output",
        str(output),
        "--json",
    ]
    assert main(argv) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 4 and all(row["jpeg_0"] == -row["jpeg_incompressibility_0"] for row in rows)
    means = {mean["reward"]: mean for mean in json.loads(capsys.readouterr().out)}
    assert means["jpeg_1"]["images"] == 4
    assert means["jpeg_1"]["mean"] == pytest.approx(sum(row["jpeg_1"] for row in rows) / 4)


def test_evaluate_a_run_leaves_a_report(finished, tmp_path, capsys):
    output = tmp_path / "report"
    assert (
        main(["evaluate", "--run", "run", *DRAW, "--rewards", "jpeg", "--output", str(output), "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((output / "report.json").read_text())
    assert (report["method"], report["prompts"], report["steps"]) == ("dpo", 2, 2)
    assert (output / "report.html").is_file()


def test_evaluate_a_model_against_itself_shows_no_gain(tmp_path, capsys):
    argv = ["evaluate", "--base", "model", "--aligned", "model", *DRAW, "--rewards", "jpeg"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    assert "+0.0000 [+0.0000, +0.0000]" in capsys.readouterr().out


def test_evaluate_several_models_with_categories(finished, tmp_path, capsys):
    rows = [{"prompt": f"a cat {i}", "category": "even" if i % 2 == 0 else "odd"} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "evaluate",
        "--base",
        "model",
        "--aligned",
        "run,run/aligned,model",
        *DRAW[2:],
        "--rewards",
        "jpeg",
    ]
    argv += ["--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "Too few prompts to tell." in said and "adjusted p" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["models"]) == ["run", "run (2)", "model"]
    assert report["models"]["run"] == report["models"]["run (2)"] and report["models"]["run"]["steps"] == 2
    assert report["models"]["model"]["gain"] == 0.0 and report["settings"]["models"]["run"] == "run"
    assert set(report["models"]["run"]["categories"]["category"]) == {"even", "odd"}
    images = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("images/*/*.png")}
    assert len(images) == 4 * 4
    assert main(argv) == 0  # again: the same, and nothing is drawn
    assert {f: f.stat().st_mtime_ns for f in images} == images
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_an_interrupted_evaluation_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from diffalign.evaluation import running

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "evaluate_models", interrupted)
    argv = ["evaluate", "--base", "model", "--aligned", "model", *DRAW, "--rewards", "jpeg"]
    assert main([*argv, "--output", str(tmp_path)]) == 130
    assert f"kept in {tmp_path}; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--base", "model", "--aligned", "model,nowhere/at/all"],
            "'nowhere/at/all': no such file or folder",
        ),
        (["--base", "model", "--aligned", "model", "--rewards", "jpeg,jpeg:x"], "'jpeg' twice"),
        (["--base", "model", "--aligned", "model", "--rewards", "jpg"], "unknown reward 'jpg'"),
        (["--base", "model"], "--base MODEL and --aligned MODEL"),
        (["--run", "run", "--base", "model"], "--run says both models"),
    ],
)
def test_evaluate_refuses_before_it_draws(finished, tmp_path, capsys, flags, words):
    argv = ["evaluate", *DRAW, "--output", str(tmp_path / "out"), "--rewards", "jpeg", *flags]
    assert main(argv) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_estimate_as_table_and_json(capsys):
    assert main(["estimate", "tiny_sdxl_dpo", "--tflops", "1"]) == 0
    assert "training time" in capsys.readouterr().out
    assert main(["estimate", "tiny_sdxl_dpo", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "sdxl" and facts["total_memory"] == sum(facts["memory"].values())


REPORT = {
    "rewards": {"judge": {"base": 0.6, "aligned": 0.7}, "taste": {"base": 0.3, "aligned": 0.4}},
    "gain": 0.1, "gain_ci95": [0.05, 0.15], "win_rate": 0.6, "alarm": ["taste fell"],
}  # fmt: skip


def test_demo_passes_its_options_and_says_where_to_look(monkeypatch, capsys):
    import diffalign.runs.demo

    seen = []
    monkeypatch.setattr(diffalign.runs.demo, "demo", lambda options: seen.append(options) or REPORT)
    argv = ["demo", "--method", "sft", "--seeds", "2", "--seed", "5", "--prompts", "9", "--output", "x"]
    assert main(argv) == 0
    assert [(o.recipe, o.seed, o.output, o.prompts) for o in seen] == [
        ("tiny_sdxl_sft", 5, "x/seed-5", 9),
        ("tiny_sdxl_sft", 6, "x/seed-6", 9),
    ]
    said = capsys.readouterr().out
    for words in ("+0.100 [+0.050, +0.150]", "60.0%", "warning: taste fell", "x/seed-5/report.html"):
        assert words in said
