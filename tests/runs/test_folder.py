"""The run directory between two starts: leftovers of killed ones, and runs that are replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.cli.train import finished
from diffalign.config.schema import DataConfig, ModelConfig, Run, TrainingConfig
from diffalign.errors import UserError
from diffalign.runs.align import Result, align
from diffalign.runs.folder import remove_earlier, remove_leftovers
from diffalign.training.trackers import TensorBoard

KILLED = """
import os, sys
from pathlib import Path
from diffalign.utils import files
kind, output = sys.argv[1], Path(sys.argv[2])
if kind == "file":
    with files.open_atomic(output / "summary.json") as file:
        file.write(b"{")
        os._exit(9)
if kind == "folder":
    with files.atomic_folder(output / "aligned") as folder:
        (folder / "half").write_text("")
        os._exit(9)
rename = os.replace
def renamed(old, new):
    rename(old, new)
    if ".old." in str(new):
        os._exit(9)
os.replace = renamed
with files.atomic_folder(output / "aligned") as folder:
    (folder / "new").write_text("")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", ["file", "folder", "swap"])
def test_what_a_killed_writer_leaves_is_removed_and_told(tmp_path, kind):
    """Killed while it writes, or between the two renames that replace a folder."""
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "old").write_text("")
    (tmp_path / "summary.json").write_text("{}")
    before = names(tmp_path)
    assert subprocess.run([sys.executable, "-c", KILLED, kind, tmp_path], check=False).returncode == 9
    assert names(tmp_path) != before
    lines = []
    remove_leftovers(tmp_path, lines.append)
    assert names(tmp_path) == before
    assert len(lines) == 1 and f".{'summary.json' if kind == 'file' else 'aligned'}." in lines[0]
    remove_leftovers(tmp_path, lines.append)
    assert len(lines) == 1


def test_files_of_others_stay(tmp_path):
    kept = [".lock", ".mine.tmp", "cache/.latents-1.partial", "export/.aligned.x.tmp", "checkpoints/step-2/a"]
    for name in (*kept, "checkpoints/.step-4.partial/a", "samples/step-000004/.0.png.1.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    lines = []
    remove_leftovers(tmp_path, lines.append)
    assert [name for name in names(tmp_path) if (tmp_path / name).is_file()] == sorted(kept)
    assert lines[0].endswith("writing: checkpoints/.step-4.partial, samples/step-000004/.0.png.1.tmp")
    (tmp_path / "aligned").symlink_to(tmp_path / "export")
    own = tmp_path / "samples" / "mine.png"
    own.touch()
    remove_earlier(tmp_path)
    assert names(own.parent) == ["mine.png"]
    assert not (tmp_path / "checkpoints").exists() and not os.path.lexists(tmp_path / "aligned")
    assert (tmp_path / "export" / ".aligned.x.tmp").is_file(), "a link is removed, not what it names"


def test_a_start_that_fails_replaces_nothing_and_removes_leftovers(tmp_path):
    """--overwrite with a model that is not there: the earlier run is whole."""
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-4.partial").mkdir()
    (tmp_path / "aligned").mkdir()
    run = Run(
        output=str(tmp_path),
        overwrite=True,
        model=ModelConfig(path=str(tmp_path / "gone")),
        data=DataConfig(path="tiny:pairs", limit=2, resolution=32),
        training=TrainingConfig(steps=1),
    )
    lines = []
    with pytest.raises(UserError, match="gone"):
        align(run, lines.append)
    assert names(tmp_path) == [".lock", "aligned", "checkpoints", "checkpoints/step-2"]
    assert "removed what an earlier start, which was killed, had not finished" in lines[0]


def test_a_run_does_not_replace_what_it_reads(tmp_path):
    """A run that starts from the adapters in its own folder would remove them."""
    (tmp_path / "run" / "aligned").mkdir(parents=True)
    own = str(tmp_path / "run" / "aligned")
    data = DataConfig(path="tiny:pairs", limit=2, resolution=32)
    run = Run(output=str(tmp_path / "run"), overwrite=True, model=ModelConfig(path=own), data=data)
    with pytest.raises(
        UserError, match=r"model\.path=.*aligned' is of the run in .*, which --overwrite true"
    ):
        align(run, lambda line: None)
    assert Path(own).is_dir()


def test_a_first_start_again_hides_the_curves_of_the_one_that_was_killed(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, last in ((0, 3), (0, 2), (2, 4)):
        tracker = TensorBoard(tmp_path, "p", {}, start)
        for step in range(start + 1, last + 1):
            tracker.log(step, {"loss": 10.0 * last + step})
        tracker.close()
        # files are read in the order of their names, which begin with a whole second
        for number, file in enumerate(
            sorted((tmp_path / "tensorboard").glob("events*"), key=os.path.getmtime)
        ):
            file.rename(file.with_name(f"events.out.tfevents.{number}.x"))
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in curves.Scalars("loss")] == [(1, 21), (2, 22), (3, 43), (4, 44)]


def test_the_time_of_training_is_of_all_starts(tmp_path):
    """``Result.seconds`` goes on from the checkpoint's, so it is not the time of this process."""
    line = finished(Run(), Result(tmp_path, tmp_path, 6, 10.2, False, "46 pairs", ""))[0]
    assert line == "done: 6 steps, 10 s of training; 46 pairs"
