"""Trackers are shown the images and videos of a step under the names that they are given."""

import sys
from types import ModuleType

import pytest
from PIL import Image

from diffalign.training.trackers import TRACKERS


@pytest.fixture
def files(tmp_path):
    found = {}
    for number, level in enumerate((10, 200)):
        file = tmp_path / f"{number:04d}-0.png"
        Image.new("RGB", (6, 4), (level, 0, 0)).save(file)
        found[f"validation/{number:03d}-0 a cat"] = file
    return found


def test_tensorboard_has_an_image_a_prompt_at_every_step(tmp_path, files):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TRACKERS["tensorboard"](tmp_path, "project", {}, 0)
    for step in (5, 10):
        tracker.log_media(step, files)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Tags()["images"]) == 2
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == [5, 10]
        assert {(event.width, event.height) for event in events.Images(tag)} == {(6, 4)}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_their_own_kind_of_media(tmp_path, files, monkeypatch, name):
    logged = []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

    module = ModuleType(name)
    module.init = lambda **options: Run()
    module.Image, module.Video = (lambda file: ("image", file)), (lambda file: ("video", file))
    monkeypatch.setitem(sys.modules, name, module)
    video = tmp_path / "0002-0.mp4"
    TRACKERS[name](tmp_path, "project", {}, 0).log_media(7, files | {"validation/002-0 a dog": video})
    ((step, values),) = logged
    assert step == 7 and list(values) == [*files, "validation/002-0 a dog"]
    assert [kind for kind, _ in values.values()] == ["image", "image", "video"]
    assert values["validation/002-0 a dog"] == ("video", str(video))
