"""Source images in the cache: encoded once, cropped as their group, in every batch, or refused."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffalign.config.schema import DataConfig
from diffalign.data import encode_preferences, read_preferences
from diffalign.data.batches.source import FixedBatches, PairSource
from diffalign.data.encoding.content import content_digest
from diffalign.errors import UserError
from tests.data.conftest import Family, Model, picture, png, row, write_parquet


@dataclass
class Sources:
    """A source's condition is its means of 8 x 8 pixels; where it is read, its mean is added to the text."""

    needed: bool = False
    read: bool = False
    encoded: list[int] = field(default_factory=list)

    def size(self, target):
        return target

    def encode(self, pixels, frames):
        assert frames == 1 and pixels.min() >= -1 and pixels.max() <= 1
        self.encoded.append(len(pixels))
        return {"source": torch.nn.functional.avg_pool2d(pixels, 8)}

    def encode_prompts(self, prompts, pixels):
        value = [len(prompt) + float(one.float().mean()) for prompt, one in zip(prompts, pixels, strict=True)]
        return {"text_embeds": torch.tensor(value)[:, None]}


@pytest.fixture
def editor():
    return Model(sources=Sources())


def edit(seed, source=None, prompt=None, **other):
    return row(seed, prompt=prompt, source_image={"bytes": png(source or 100 + seed), "path": None}, **other)


def encode(tmp_path, rows, model, **settings):
    path = write_parquet(tmp_path / "pairs.parquet", rows)
    config = DataConfig(path=str(path), **{"resolution": 16, **settings})
    encoded = encode_preferences(model, read_preferences(config), config, tmp_path / "cache", False)
    return encoded, config


def resized(seed):
    image = np.array(picture(seed).resize((16, 16), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(image).permute(2, 0, 1)


def shrunk(seed, flipped=False):
    """Return a row's source as the fake model encodes it: resized from 40 to 16 pixels, then 8 x 8 means."""
    pixels = resized(seed)
    pixels = (pixels.flip(-1) if flipped else pixels) / 127.5 - 1
    return pixels.view(3, 2, 8, 2, 8).mean((2, 4))


def test_a_source_is_a_condition_of_each_of_its_images(tmp_path, editor):
    encoded, config = encode(tmp_path, [edit(0), edit(1), edit(2)], editor)
    for guided in (False, True):
        (batch,) = FixedBatches(encoded, Family(), config, 3, guided=guided)
        assert batch.cond["source"].shape == (6, 3, 2, 2)
        for place in range(6):
            assert_close(batch.cond["source"][place], shrunk(100 + place // 2), rtol=0, atol=1e-6)
        assert ("text_embeds" in batch.negative) == guided and "source" not in batch.negative


def test_a_source_is_encoded_once_and_shared(tmp_path, editor):
    rows = [edit(0, 50), edit(1, 50), edit(2, 51)]
    encode(tmp_path, rows, editor)
    assert sum(editor.sources.encoded) == 2
    again = Model(sources=Sources())
    encoded, _ = encode(tmp_path, rows, again)
    assert again.sources.encoded == [] and again.images == 0
    assert encoded[0].source.key == encoded[1].source.key != encoded[2].source.key
    encoded, _ = encode(tmp_path, [*rows, edit(3, 52)], again)  # another set, which shares what is there
    assert sum(again.sources.encoded) == 1 and len(encoded) == 4


def test_a_source_is_flipped_with_its_group(tmp_path, editor):
    encoded, config = encode(tmp_path, [edit(0)], editor, flip=True, posterior="mean")
    batches = PairSource(encoded, Family(), config, 1, seed=3)
    seen = {False: 0, True: 0}
    for number in range(12):
        batch = batches.batch(number)
        flipped = bool(torch.allclose(batch.cond["source"][0], shrunk(100, True), atol=1e-6))
        assert flipped or torch.allclose(batch.cond["source"][0], shrunk(100), atol=1e-6)
        assert torch.equal(batch.x[0], encoded.moments(encoded[0].images[0], flipped)[0])
        seen[flipped] += 1
    assert min(seen.values()) > 0


def test_a_text_encoder_that_sees_the_source_encodes_each_prompt_with_it(tmp_path):
    model = Model(sources=Sources(read=True))
    encoded, config = encode(tmp_path, [edit(0, prompt="abc"), edit(1, prompt="abc")], model)
    (batch,) = FixedBatches(encoded, Family(), config, 2, guided=True)
    means = [float(resized(seed).mean()) for seed in (100, 101)]
    assert_close(batch.cond["text_embeds"][:, 0], torch.tensor([3.0 + m for m in means for _ in "ab"]))
    assert_close(batch.negative["text_embeds"][:, 0], torch.tensor([m for m in means for _ in "ab"]))
    dropped = PairSource(encoded, Family(), DataConfig(prompt_dropout=1.0, posterior="mean"), 1)
    assert float(dropped.batch(0).cond["text_embeds"][0]) in [pytest.approx(m, abs=1e-3) for m in means]
    with pytest.raises(UserError, match=r"data\.flip is true.*sees the source"):
        encode(tmp_path, [edit(0)], model, flip=True)


def test_a_source_counts_in_the_sets_content(tmp_path, editor):
    digests = [content_digest(encode(tmp_path, [edit(0, s)], editor)[0].records) for s in (50, 51, 50)]
    assert digests[0] == digests[2] != digests[1]


def test_repeats_are_of_one_source(tmp_path, editor):
    rows = [edit(0, 50), {**edit(0, 51)}, edit(0, 50)]
    encoded, _ = encode(tmp_path, rows, editor, **{"filters": DataConfig().filters})
    assert len(encoded) == 3
    filters = replace(DataConfig().filters, repeats=True)
    encoded, _ = encode(tmp_path, rows, editor, filters=filters)
    assert [record.where for record in encoded] == ["pairs.parquet row 0", "pairs.parquet row 1"]


def test_a_model_that_takes_no_source_refuses_the_row(tmp_path):
    with pytest.raises(UserError, match=r"row 0: the row has a source image.*model takes none"):
        encode(tmp_path, [edit(0)], Model())


def test_a_model_that_needs_a_source_refuses_a_row_without(tmp_path):
    with pytest.raises(UserError, match=r"row 0: no source image"):
        encode(tmp_path, [row(0)], Model(sources=Sources(needed=True)))


def test_some_with_and_some_without_a_source_are_no_set(tmp_path, editor):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        (tmp_path / f"{name}.png").write_bytes(png(seed))
    pair = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    (tmp_path / "rows.json").write_text(json.dumps([{**pair, "path_src": "c.png"}, {**pair, "prompt": "y"}]))
    config = DataConfig(path=str(tmp_path / "rows.json"), resolution=16)
    with pytest.raises(UserError, match=r"entry 0 has a source image and rows\.json entry 1 has none"):
        encode_preferences(editor, read_preferences(config), config, tmp_path / "cache", False)


def test_an_unreadable_source_is_skipped_and_named(tmp_path, editor):
    bad = {**edit(1), "source_image": {"bytes": b"no image", "path": None}}
    encoded, _ = encode(tmp_path, [edit(0), bad], editor)
    assert len(encoded) == 1
    assert "the source is unreadable" in encoded.counts.skipped[0]
