"""Weight maps: read, cut as the image is, averaged over latent cells, mirrored with it."""

import re
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config.schema import DataConfig
from diffalign.data import PairSource, encode_preferences, fixed_batches, read_preferences
from diffalign.data.encoding.geometry import Cut
from diffalign.data.encoding.patches import cut_map, pool, read_map
from diffalign.errors import UserError
from tests.data.conftest import Family, Model, png, write_jsonl

RAMP = np.arange(16, dtype=np.float32).reshape(4, 4)


def npy(array):
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def grey(array):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_arrays_and_grey_pictures():
    assert read_map(npy(RAMP)).tolist() == RAMP.tolist()
    assert read_map(npy(RAMP[None].astype(np.float16))).tolist() == RAMP.tolist()
    eight = read_map(grey(np.array([[0, 51], [102, 255]], dtype=np.uint8)))
    sixteen = read_map(grey(np.array([[0, 13107], [26214, 65535]], dtype=np.uint16)))
    for weights in (eight, sixteen):
        assert weights.dtype == torch.float32
        assert torch.allclose(weights, torch.tensor([[0, 0.2], [0.4, 1.0]]))


def test_areas_are_averaged():
    assert pool(torch.from_numpy(RAMP), (2, 2)).tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert pool(torch.tensor([[1.0, 3.0]]), (2, 4)).tolist() == [[1, 1, 3, 3]] * 2


def test_a_map_is_cut_as_its_image():
    # an image of 40 x 80, resized to 8 x 16, cut 8 x 8 from column 4: the map's middle
    cut = Cut((40, 80), (8, 16), (0, 4), (8, 8))
    weights = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert cut_map(weights, cut).tolist() == [[1.0] * 4 + [2.0] * 4] * 8


@pytest.fixture
def entry(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "m.npy").write_bytes(npy(RAMP))
    return {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}


def encode(tmp_path, entries, model=None, **settings):
    folder = tmp_path if (tmp_path / "0.png").is_file() else tmp_path.parent
    config = DataConfig(path=str(write_jsonl(folder / "p.jsonl", entries)), resolution=16, **settings)
    preferences = read_preferences(config)
    return encode_preferences(model or Model(), preferences, config, tmp_path / "c", False)


def test_maps_have_the_latents_size_and_ones_where_there_is_none(tmp_path, entry):
    entries = [{**entry, "patches": ["m.npy", None]}, entry]
    for _ in range(2):  # fresh, and from the cache
        encoded = encode(tmp_path, entries)
        batch = next(fixed_batches(encoded, Family(), DataConfig(), 2))
        assert batch.extra["patches"].shape == (4, 1, 2, 2) == (*batch.x.shape[:1], 1, *batch.x.shape[2:])
        assert batch.extra["patches"][0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
        assert (batch.extra["patches"][1:] == 1).all()


def test_one_mask_is_the_map_of_all_images_of_a_row(tmp_path, entry):
    encoded = encode(tmp_path, [{**entry, "mask": "m.npy"}, {**entry, "mask": None}])
    batch = next(fixed_batches(encoded, Family(), DataConfig(), 2))
    both = encode(tmp_path / "b", [{**entry, "patches": ["m.npy", "m.npy"]}, entry])
    expected = next(fixed_batches(both, Family(), DataConfig(), 2))
    assert torch.equal(batch.extra["patches"], expected.extra["patches"])
    assert (batch.extra["patches"][2:] == 1).all() and batch.extra["patches"][0].max() > 1
    with pytest.raises(UserError, match=r"p\.jsonl line 1: the row has a mask and patches; allowed: one"):
        encode(tmp_path / "c", [{**entry, "mask": "m.npy", "patches": ["m.npy", None]}])


def test_maps_are_written_while_their_latents_wait(tmp_path, entry):
    encoded = encode(tmp_path, [{**entry, "patches": ["m.npy", "m.npy"]}], cache_batch_size=64)
    assert encoded.weights(encoded[0], 1).shape == (1, 2, 2)


def test_a_flip_mirrors_the_map_with_the_image(tmp_path, entry):
    encoded = encode(tmp_path, [{**entry, "patches": ["m.npy", None]}], flip=True)
    source = PairSource(encoded, Family(), DataConfig(flip=True, posterior="mean"), 1)
    seen = set()
    for step in range(20):
        batch = source.batch(step)
        flipped = torch.equal(batch.x[0], encoded.moments(encoded[0].images[0], True)[0])
        expected = [[4.5, 2.5], [12.5, 10.5]] if flipped else [[2.5, 4.5], [10.5, 12.5]]
        assert batch.extra["patches"][0, 0].tolist() == expected
        seen.add(flipped)
    assert seen == {True, False}


def test_a_changed_map_is_another_map(tmp_path, entry):
    encode(tmp_path, [{**entry, "patches": ["m.npy", None]}])
    (tmp_path / "m.npy").write_bytes(npy(2 * RAMP))
    model = Model()
    encoded = encode(tmp_path, [{**entry, "patches": ["m.npy", None]}], model)
    assert encoded.weights(encoded[0], 0)[0, 0, 0] == 5 and not model.batches


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"hello", "not an image in one of the formats"),
        (npy(np.zeros((3, 4, 4))), r"an array of float64 \(3, 4, 4\); a map is numbers \(height, width\)"),
        (npy(np.array([["a"]])), "a map is numbers"),
        (npy(-RAMP), "finite and not negative"),
        (npy(np.full((2, 2), np.inf)), "finite and not negative"),
        (npy(np.zeros((0, 4))), "a map is numbers"),
    ],
)
def test_a_map_that_is_none_is_named(tmp_path, entry, content, reason):
    (tmp_path / "bad.npy").write_bytes(content) if content is not None else None
    encoded = encode(tmp_path, [{**entry, "patches": ["bad.npy", None]}, entry])
    assert re.search(rf"p\.jsonl line 1: bad\.npy is unreadable \(.*{reason}", encoded.counts.skipped[0])
