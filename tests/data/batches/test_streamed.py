"""A set that is trained on while it is encoded: the order, what is held out, resume, what is refused."""

import pickle
from dataclasses import replace
from itertools import islice

import pytest
import torch

from diffalign.config.schema import DataConfig, FilterConfig
from diffalign.data import PairSource, encode_preferences, read_preferences, split_holdout
from diffalign.data.batches.streamed import StreamedSource
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.stream import Stream
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.runs.align import align
from diffalign.runs.streaming import check_streaming
from diffalign.runs.validate import read_run
from tests.data.conftest import Family, Model, row, write_parquet

ROWS = 23


@pytest.fixture
def streamed(tmp_path):
    """streamed(folder, rows=..., **settings): a source and its model."""

    def make(folder, rows=None, finished=lambda counts: None, fails_after=None, **settings):
        path = tmp_path / "pairs.parquet"
        if rows is not None or not path.exists():
            write_parquet(path, rows or [row(i, prompt=f"p{i % 9}") for i in range(ROWS)])
        given = {"resolution": 16, "stream_block": 6, "holdout": 0.2, "cache_batch_size": 2, **settings}
        config = DataConfig(path=str(path), **given)
        model = Model(fails_after=fails_after)
        stream = Stream(model, read_preferences(config), config, tmp_path / folder, finished=finished)
        return StreamedSource(stream, Family(), config, 2), model

    return make


def places(source, positions):
    return [int(source._record(position).where.split()[-1]) for position in positions]


def test_the_first_epoch_goes_block_by_block_and_later_ones_as_usual(streamed, tmp_path):
    told = []
    source, model = streamed("a", finished=lambda counts: told.append(counts.text))
    assert 12 <= model.images < 2 * ROWS and not told  # only the first block was encoded
    apart = {record.prompt for record in source.held_out}
    blocks = [
        [i for i in range(first, min(first + 6, ROWS)) if f"p{i % 9}" not in apart]
        for first in range(0, ROWS, 6)
    ]
    assert len(source.held_out) == 1 and source.begun == len(blocks[0]) == 5
    at, every = 0, [i for block in blocks for i in block]
    for block in blocks:
        assert sorted(places(source, range(at, at + len(block)))) == block
        at += len(block)
    assert places(source, range(at)) != every  # shuffled within blocks
    second = places(source, range(at, 2 * at))
    assert sorted(second) == sorted(every) and model.images == 2 * ROWS
    assert told == ["23 pairs, 0 ties, 0 rows without label, 0 unreadable"]
    assert source.counts == f"{told[0]}, streamed from 5 groups on"
    config = DataConfig(path=str(tmp_path / "pairs.parquet"), resolution=16)
    whole = encode_preferences(Model(), read_preferences(config), config, tmp_path / "a", False)
    learned = whole.subset([i for i, record in enumerate(whole) if record.prompt not in apart])
    usual = PairSource(learned, Family(), config, 2)
    assert second == [int(usual._record(position).where.split()[-1]) for position in range(at)]


def test_the_state_of_the_cache_changes_no_batch_and_resume_is_exact(streamed):
    settings = {"prompt_dropout": 0.4, "flip": True}
    source, _ = streamed("a", **settings)
    batches = list(islice(iter(source), 25))
    again, model = streamed("a", **settings)  # the cache is complete
    again.seek(7)
    for batch, other in zip(batches[7:], again, strict=False):
        assert torch.equal(batch.x, other.x) and torch.equal(batch.score, other.score)
        assert all(torch.equal(batch.cond[name], other.cond[name]) for name in batch.cond)
    assert not model.images
    with pytest.raises(KeyboardInterrupt):  # killed on the way
        list(islice(iter(streamed("b", fails_after=8, **settings)[0]), 25))
    half, model = streamed("b", **settings)
    half.seek(3)
    for batch, other in zip(batches[3:], half, strict=False):
        assert torch.equal(batch.x, other.x)
    assert 0 < model.images < 4 * ROWS


def test_filters_of_single_groups_are_counted_over_blocks(streamed):
    rows = [row(i, prompt="a bad word" if i % 4 == 3 else f"p{i}") for i in range(ROWS)]
    source, _ = streamed("a", rows=rows, filters=FilterConfig(words=("bad",)), holdout=0.0)
    assert sorted(places(source, range(18))) == [i for i in range(ROWS) if i % 4 != 3]
    assert "18 pairs" in source.counts and "5 left out by data.filters (words)" in source.counts


def test_an_early_end_keeps_what_was_encoded(streamed):
    source, model = streamed("a")
    source.close()
    assert source.counts.endswith("streamed from 5 groups on, not encoded to the end")
    again, other = streamed("a")
    places(again, range(18))
    assert other.images <= 2 * ROWS - 12 and model.images >= 12


def test_blocks_that_do_not_fit_together_are_refused(streamed):
    rows = [row(i, rewards=[[0.5], [0.4]]) if i < 6 else row(i) for i in range(12)]
    source, _ = streamed("a", rows=rows, holdout=0.0)
    for _ in range(2):  # and again, rather than taking the error for the end of the set
        with pytest.raises(UserError, match=r"data.stream_block=6: .*row 6 .*differ in rewards"):
            source.batch(3)
    with pytest.raises(UserError, match="leave out the whole first block"):
        streamed("b", rows=rows, filters=FilterConfig(min_prompt=100))


def test_a_run_trains_before_its_set_is_encoded(tmp_path):
    run = read_run("tiny_sdxl_dpo")
    run = replace(
        run,
        output=str(tmp_path / "run"),
        data=replace(run.data, limit=24, stream_block=8, holdout=0.2, cache_batch_size=8),
        training=replace(run.training, steps=2, batch_size=2, accumulation=1),
        logging=replace(run.logging, diagnostics_bins=2),
        validation=replace(run.validation, every=0),
    )
    lines = []
    result = align(run, lines.append)
    assert "7 groups are there when training begins, 1 held out" in "\n".join(lines)
    assert result.counts.endswith("streamed from 7 groups on, not encoded to the end")
    longer = replace(run, training=replace(run.training, steps=12), resume="latest")
    result = align(longer, lines.append)
    assert any(line.startswith("data: encoded to the end: ") for line in lines)
    assert result.steps == 12 and result.counts.endswith("streamed from 7 groups on")
    for changes, message in (
        ({"data": replace(run.data, view="likes")}, "data.stream_block=8: data.view needs the whole set"),
        ({"validation": replace(run.validation, every=5)}, "validation.every needs the whole set"),
    ):
        with pytest.raises(UserError, match=message):
            check_streaming(replace(run, **changes), build(run.method))
    check_streaming(run, build(run.method))


def test_parts_are_joined_in_order(encoded):
    whole = encoded([row(i) for i in range(5)]).records
    assert list(Columns.joined([whole.take([3, 1]), whole.take([4])])) == [whole[3], whole[1], whole[4]]
    again = pickle.loads(pickle.dumps(encoded([row(i) for i in range(5)]).records))  # of a mapped file
    assert list(again) == list(whole)
    assert split_holdout(encoded([row(i) for i in range(5)]), 0.0, 9, 0)[0].records.rows.tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
