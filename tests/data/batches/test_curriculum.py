"""Curriculum stages: their groups and order, for any split of the work."""

from dataclasses import replace

import pytest
import torch

from diffalign.config.schema import CurriculumConfig, DataConfig
from diffalign.data import PairSource, encode_preferences, read_preferences
from diffalign.data.batches.order import gaps, stages
from diffalign.errors import UserError
from tests.data.conftest import Family, Model, png, write_jsonl

GAPS = [0.1, 1.0, 0.0, 0.6, 0.8, 0.4, 0.2, 0.9]


@pytest.fixture
def gapped(tmp_path):
    """Eight pairs "a" ... "h" of those gaps, the third one a tie; rewards run the other way round."""
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    entries = [
        {"prompt": chr(97 + i), "images": ["0.png", "1.png"], "scores": [0, g], "rewards": [[1, 0], [g, 0]]}
        for i, g in enumerate(GAPS)
    ]
    config = DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", entries)), resolution=16)
    return encode_preferences(Model(), read_preferences(config), config, tmp_path / "c", False)


def staged(records, config):
    return [stage.tolist() for stage in stages(records, config)]


def source(encoded, batch_size=2, accumulation=1, rank=0, world=1, seed=0, **settings):
    config = DataConfig(posterior="mean", curriculum=CurriculumConfig(**settings))
    return PairSource(
        encoded, Family(), config, batch_size, accumulation=accumulation, rank=rank, world=world, seed=seed
    )


def prompts(source, first, count):
    """Return the prompts of ``count`` micro-batches, as letters."""
    return [
        chr(int(value))
        for step in range(first, first + count)
        for value in source.batch(step).cond["text_embeds"][::2, 0].tolist()
    ]


def test_thresholds_fall_evenly_from_the_widest_gap_to_the_narrowest(gapped):
    found = staged(gapped.records, CurriculumConfig(stages=3))  # 0.7, 0.4, 0.1
    assert found == [[1, 4, 7], [1, 3, 4, 5, 7], [0, 1, 3, 4, 5, 6, 7]]
    apart = staged(gapped.records, CurriculumConfig(stages=3, cumulative=False))
    assert apart == [[1, 4, 7], [3, 5], [0, 6]]


def test_small_gaps_and_ties_are_in_no_stage(gapped):
    assert staged(gapped.records, CurriculumConfig(stages=1)) == [[0, 1, 3, 4, 5, 6, 7]]
    assert staged(gapped.records, CurriculumConfig(stages=1, min_gap=0.5)) == [[1, 3, 4, 7]]


def test_gaps_of_scores_and_of_mean_rewards(gapped):
    by_score, by_reward = CurriculumConfig(stages=1), CurriculumConfig(stages=1, by="reward")
    assert gaps(gapped.records, by_score).tolist() == GAPS
    expected = [0 if g == 0 else (1 - g) / 2 for g in GAPS]
    assert gaps(gapped.records, by_reward).tolist() == pytest.approx(expected)


def test_each_stage_shows_its_groups_for_its_steps_and_the_last_goes_on(gapped):
    train = source(gapped, batch_size=3, stages=3, steps=4)  # windows of 3: stages of 12 positions
    assert set(prompts(train, 0, 4)) == set("beh")
    assert set(prompts(train, 4, 4)) == set("bdefh")
    assert set(prompts(train, 8, 4)) == set("abdefgh") == set(prompts(train, 500, 4))
    first = prompts(train, 0, 4)
    assert all(sorted(first[i : i + 3]) == ["b", "e", "h"] for i in range(0, 12, 3))  # epochs


def test_how_a_step_is_cut_changes_nothing(gapped):
    settings = {"stages": 3, "steps": 2}
    whole = prompts(source(gapped, 8, **settings), 0, 8)
    assert prompts(source(gapped, 1, accumulation=8, **settings), 0, 64) == whole
    ranks = [source(gapped, 2, 2, rank, 2, **settings) for rank in range(2)]
    assert [p for step in range(16) for r in range(2) for p in prompts(ranks[r], step, 1)] == whole


def test_seeking_is_having_iterated(gapped):
    straight = iter(source(gapped, stages=3, steps=3))
    batches = [next(straight) for _ in range(14)]
    sought = source(gapped, stages=3, steps=3)
    for start in (11, 2):
        sought.seek(start)
        for expected, batch in zip(batches[start : start + 3], sought, strict=False):
            assert torch.equal(expected.x, batch.x) and torch.equal(expected.score, batch.score)


def test_no_stages_leave_the_order_as_it_was(gapped):
    plain = prompts(PairSource(gapped, Family(), DataConfig(posterior="mean"), 2), 0, 12)
    assert prompts(source(gapped), 0, 12) == plain


def test_equal_gaps_make_one_set_of_all_stages(gapped):
    equal = gapped.holding(replace(record, scores=(1.0, 0.0)) for record in gapped)
    assert staged(equal.records, CurriculumConfig(stages=4)) == [list(range(8))] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_gap": 1.5}, r"data.curriculum.min_gap is 1.5; allowed: at most the widest gap, 1\b"),
        (
            {"stages": 20, "cumulative": False},
            r"data.curriculum.stages is 20, but stage 2 has no group: no gap from 0.91 to 0.955; allowed",
        ),
    ],
)
def test_a_curriculum_that_the_set_does_not_bear(gapped, settings, message):
    with pytest.raises(UserError, match=message):
        source(gapped, **{"stages": 2, **settings})


def test_single_images_and_sets_without_reward_have_no_gap(gapped):
    single = replace(gapped[0], images=gapped[0].images[:1], scores=(1.0,))
    with pytest.raises(UserError, match=r"line 1: data.curriculum.stages is 2, but the image has no rival"):
        source(gapped.holding([single]), stages=2)
    bare = replace(gapped[0], rewards=())
    with pytest.raises(UserError, match=r"line 1: data.curriculum.by is 'reward', but there is no reward"):
        source(gapped.holding([bare]), stages=2, by="reward")
