"""Runs whose tokens are shared by two processes: equal to one process, resumed by one, counted once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diffalign.config.schema import Run, TrainingConfig
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.runs.align import align
from diffalign.runs.launcher import with_launcher
from diffalign.runs.role_checks import check_roles
from diffalign.training.context import check_degree
from tests.helpers import in_two_processes
from tests.runs.context_worker import CASES, STEPS, recipe
from tests.tiny_pipelines import make_flux
from tests.video_pipelines import make_wan

pytestmark = pytest.mark.slow


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without what depends on the machine, or on the sign of a margin: that of
    the first step is rounding.
    """
    unequal = ("samples_per_second", "peak_memory_gib", "rewards/accuracies")
    read = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in unequal} for row in read]


def _trained(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("heldout/")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs of one group of two processes, and of one of two groups."""
    folder = tmp_path_factory.mktemp("context")
    for name, make in (("flux", make_flux), ("wan", make_wan)):
        make(folder / name)
    in_two_processes("tests.runs.context_worker", folder, *CASES, pipelines=True)
    in_two_processes("tests.runs.context_worker", folder, "flux", processes=4, pipelines=True)
    return folder


@pytest.fixture(scope="module")
def alone(shared: Path) -> dict[str, Path]:
    """Return the folders of the same runs in one process."""
    folders = {}
    for case in CASES:
        folders[case] = shared / f"{case}-one"
        align(replace(recipe(shared, case), output=str(folders[case])), lambda line: None)
    return folders


@pytest.mark.parametrize("case", [*(f"{case}-1" for case in CASES), "flux-2"])
def test_processes_that_share_tokens_are_one(shared: Path, alone: dict[str, Path], case: str) -> None:
    """Losses, gradient norms and held-out metrics of one group, and of two, to 1e-5."""
    ours, theirs = rows(alone[case[:-2]]), rows(shared / case)
    if case.endswith("2"):  # half as many steps, and held-out batches of another size
        ours, theirs = ([_trained(row) for row in several[: STEPS // 2]] for several in (ours, theirs))
    assert [row.keys() for row in theirs] == [row.keys() for row in ours]
    losses = [row["loss"] for row in ours if "loss" in row]
    assert len({round(loss, 3) for loss in losses}) == len(losses), "the run learns"
    assert [row["loss"] for row in theirs if "loss" in row] == pytest.approx(losses, rel=1e-5, abs=0)
    for one, two in zip(ours, theirs, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)  # rewards near 0 are differences


def test_what_is_saved_is_that_of_one(shared: Path, alone: dict[str, Path]) -> None:
    for case in ("flux", "wan"):
        name = "aligned/pytorch_lora_weights.safetensors"
        one, two = load_file(alone[case] / name), load_file(shared / f"{case}-1" / name)
        assert one.keys() == two.keys()
        difference = sum(float((one[key] - two[key]).square().sum()) for key in one)
        assert difference < 1e-6 * sum(float(value.square().sum()) for value in one.values())
    pictures = sorted(path.name for path in (alone["wan"] / "samples/step-000003").iterdir())
    assert pictures and pictures == sorted(p.name for p in (shared / "wan-1/samples/step-000003").iterdir())


def test_one_process_goes_on_and_counts_what_was_seen_once(shared: Path, alone: dict[str, Path]) -> None:
    """A record of steps 1 to 4 is interrupted by the checkpoint of step 3: its sums are those of one."""
    resumed = replace(recipe(shared, "wan"), output=str(shared / "wan-1"), resume="step-3")
    assert align(resumed, lambda line: None).steps == STEPS
    for one, two in zip(rows(alone["wan"]), rows(shared / "wan-1"), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)  # rewards near 0 are differences
    states = [
        json.loads((f / "checkpoints/step-3/state.json").read_text())
        for f in (alone["wan"], shared / "wan-1")
    ]
    assert states[0]["facts"]["counters"] == states[1]["facts"]["counters"]
    assert len(states[0]["facts"]["meter"]) == len(states[1]["facts"]["meter"]) == 1


def test_the_first_process_says_what_a_step_sees(shared: Path) -> None:
    one, two = ((shared / f"lines-{groups}-0.txt").read_text() for groups in (1, 2))
    assert "training.context=2: 2 processes in 1 group;" in one
    assert "training.context=2: 4 processes in 2 groups" in two
    for lines in (one, two):
        assert " steps of 4 groups, " in lines
    assert not (shared / "lines-2-3.txt").read_text(), "one process speaks"


@pytest.mark.parametrize(
    ("degree", "processes", "allowed"), [(2, 1, "1 process: 1"), (4, 6, "6 processes: 1, 2, 3, 6")]
)
def test_groups_must_be_whole(
    degree: int, processes: int, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    run = Run(training=TrainingConfig(context=degree))
    with pytest.raises(UserError, match=f"training.context={degree}.*allowed with {allowed}"):
        check_roles(run, build(run.method))
    check_degree(run.training, 3 * degree)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"shard": "full"}}, "training.shard='full' with training.context=2; allowed: 'none'"),
        ({"model": {"compile": True}}, "model.compile=True"),
        ({"model": {"dropout": True}}, "model.dropout=True"),
        ({"model": {"attention": "flash"}}, "model.attention='flash' with training.context=2; allowed: auto"),
        ({"rollout": {"prompts": "tiny:prompts"}}, "rollout.prompts"),
        ({"validation": {"rewards": ("jpeg",)}}, "validation.rewards"),
        ({"method": {"type": "inversion_dpo"}}, "inversion_dpo; allowed: training.context 1"),
        ({"method": {"type": "distillation_dpo"}}, "training.context=2 with method distillation_dpo"),
    ],
)
def test_what_shared_tokens_do_not_have_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    run = Run(training=TrainingConfig(context=2))
    for name, fields in changes.items():
        run = replace(run, **{name: fields if name == "method" else replace(getattr(run, name), **fields)})
    with pytest.raises(UserError, match=words):
        check_roles(run, build(run.method))


def test_context_of_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(UserError, match=r"PARALLELISM_CONFIG_CP_SIZE=2.*allowed.*training.context 2"):
        with_launcher(Run(), print)
