import pytest

from diffalign.config.schema import FilterConfig
from diffalign.data.encoding.filters import agreeing, margin
from diffalign.errors import UserError
from tests.data.conftest import png, row

REWARDS = [[0.9, 0.8], [0.1, 0.9]]  # of the two images: one reward agrees with the label (1, 0), one does not


def rows():
    """Six pairs: a tie, a repeat of the first, one with small images, a long prompt, a forbidden word."""
    plain = [row(number, rewards=REWARDS) for number in range(6)]
    plain[1] = {**row(1, (0.5, 0.5)), "rewards": REWARDS}
    plain[2] = dict(plain[0])
    plain[3] = {**row(3, sizes=((40, 20), (40, 40))), "rewards": REWARDS}
    plain[4]["caption"] = "p" * 50
    plain[5]["caption"] = "a Forbidden word"
    return plain


@pytest.mark.parametrize(
    ("filters", "left", "told"),
    [
        ({"words": ("forbidden",)}, [0, 1, 2, 3, 4], "1 left out by data.filters (words)"),
        ({"min_prompt": 9}, [4, 5], "4 left out by data.filters (prompt length)"),
        ({"max_prompt": 20}, [0, 1, 2, 3, 5], "1 left out by data.filters (prompt length)"),
        ({"min_side": 30}, [0, 1, 2, 4, 5], "1 left out by data.filters (size)"),
        ({"repeats": True}, [0, 1, 3, 4, 5], "1 left out by data.filters (repeats)"),
        ({"agree": 1}, [0, 1, 2, 3, 4, 5], "0 left out by data.filters (agreement)"),
        ({"agree": 2, "words": ("p",)}, [], None),
        ({"min_margin": 0.3}, [0, 1, 2, 3, 4, 5], "0 left out by data.filters (margin)"),
        ({"max_prompt": 20, "repeats": True}, [0, 1, 3, 5], "1 left out by data.filters (repeats)"),
    ],
)
def test_filters_leave_out_what_they_say_and_count_it(encoded, filters, left, told):
    if not left:
        with pytest.raises(UserError, match=r"nothing to learn from.*left out by data.filters \(words\)"):
            encoded(rows(), filters=FilterConfig(**filters))
        return
    whole = encoded(rows(), filters=FilterConfig(**filters))
    assert [int(record.where.split()[-1]) for record in whole] == left
    assert told in whole.counts.text and whole.counts.usable + whole.counts.ties == len(left)


def test_agreement_and_margin_of_rewards(encoded):
    pair = encoded(rows())[0]
    assert agreeing(pair) == 1 and margin(pair) == pytest.approx(0.85 - 0.5)
    with pytest.raises(UserError, match=r"nothing to learn from: 0 pairs, 1 tie,"):
        encoded(rows(), filters=FilterConfig(agree=2))


def test_a_classifiers_score_filters_and_is_no_reward(encoded):
    table = [row(number, rewards=[[0.5, number / 4], [0.4, 0.0]]) for number in range(4)]
    left = encoded(table, filters=FilterConfig(nsfw=1, max_nsfw=0.5))
    assert [record.rewards for record in left] == [((0.5,), (0.4,))] * 3
    assert "1 left out by data.filters (nsfw)" in left.counts.text
    with pytest.raises(UserError, match=r"data.filters.nsfw is 2, but an image has 2 rewards"):
        encoded(table, filters=FilterConfig(nsfw=2))


def test_filters_by_reward_need_rewards(encoded):
    with pytest.raises(UserError, match=r"data.filters.agree compares rivals by reward, but there is no"):
        encoded([row(0), {**row(1), "jpg_0": png(9)}], filters=FilterConfig(agree=1))
