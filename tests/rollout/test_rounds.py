"""The plan of a round: groups, slots and passes, and the samples that are trained on."""

import pytest
import torch

from diffalign.diffusion.samplers import DDIM
from diffalign.errors import UserError
from diffalign.rollout.rounds import Place, Plan, Round, best_and_worst, only
from diffalign.types import Transition


def visits(plans, micro_steps):
    """(position of the prompt, slot) in the order of the run's groups: micro-step by micro-step, rank by
    rank.
    """
    found = []
    for micro_step in range(micro_steps):
        for plan in plans:
            place = plan.place(micro_step)
            found += [(plan.position(place.round, row), place.slot) for row in range(*place.rows)]
    return found


def test_any_split_over_ranks_and_micro_batches_visits_the_same_groups_in_the_same_order():
    one = [Plan(prompts=8, slots=3, batch_size=4)]
    small = [Plan(prompts=8, slots=3, batch_size=1)]
    two = [Plan(prompts=4, slots=3, batch_size=2, rank=r, world=2) for r in range(2)]
    expected = visits(one, 12)
    assert expected == visits(small, 48) == visits(two, 12)
    assert expected[:8] == [(p, 0) for p in range(8)] and expected[8] == (0, 1) and expected[24] == (8, 0)


def test_a_round_shows_every_slot_of_every_prompt_once_a_pass():
    plan = Plan(prompts=4, slots=3, batch_size=2, passes=2)
    assert plan.micro_steps == 12
    seen = visits([plan], 12)
    assert sorted(seen) == sorted([(p, s) for p in range(4) for s in range(3)] * 2)
    assert plan.place(12) == Place(1, (0, 2), 0)


def test_ranks_share_the_prompts_of_a_round_without_overlap():
    plans = [Plan(prompts=6, slots=1, batch_size=2, rank=r, world=3) for r in range(3)]
    for number in (0, 4):
        positions = [plan.position(number, row) for plan in plans for row in range(6)]
        assert sorted(positions) == list(range(number * 18, number * 18 + 18))


def test_prompts_that_do_not_fill_micro_batches_are_refused():
    with pytest.raises(
        UserError, match=r"prompts_per_round=10; allowed: a multiple of training.batch_size=4"
    ):
        Plan(prompts=10, slots=1, batch_size=4)


def made(score, shared=True, extra=None, slots=2):
    """Return a round of 3 prompts, 2 slots, 2 rivals, whose latents encode their place."""
    n, k = 3, 2
    where = torch.arange(n * slots * k, dtype=torch.float32).reshape(n, slots, k)
    states = [where[..., None], where[..., None] + 0.5, where, where, where]
    return Round(
        Transition(*states),
        {"text": torch.arange(n)[:, None]},
        {"text": torch.zeros(n, 1)},
        score,
        torch.full((n, slots), shared),
        torch.tensor([[1, 0]] * n),
        extra or {},
        DDIM(1.0),
        5.0,
    )


def test_a_batch_is_the_groups_of_a_place_in_each_prompts_own_order():
    score = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]] * 3)
    batch = made(score).batch(Place(0, (1, 3), 0))
    assert batch.x.logp.tolist() == [6, 7, 10, 11]  # slot 1 of prompts 1 and 2
    assert batch.group.tolist() == [0, 0, 1, 1] and batch.score.tolist() == [2, 3, 2, 3]
    assert batch.cond["text"].flatten().tolist() == [1, 1, 2, 2] and batch.guidance == 5
    assert batch.state.tolist() == [0, 0, 2, 2] and batch.kernel == DDIM(1.0)
    assert made(score, shared=False).batch(Place(0, (1, 3), 0)).state.tolist() == [0, 1, 2, 3]


def test_groups_that_are_ties_are_left_out_but_never_all():
    score = torch.tensor([[[0.0, 1.0], [2.0, 2.0]], [[0.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    whole = made(score)
    assert whole.useful.tolist() == [[True, False], [True, True], [False, False]]
    assert whole.batch(Place(0, (0, 3), 0)).cond["text"].flatten().tolist() == [1, 1]
    assert whole.batch(Place(0, (2, 3), 0)).score.tolist() == [1, 1]  # a tie, of weight 0


def test_several_rewards_tie_where_neither_rival_dominates():
    rows = [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]
    score = torch.tensor(rows)[:, None].expand(3, 2, 2, 2)
    assert made(score).useful[:, 0].tolist() == [False, True, False]


def test_advantages_decide_where_there_are_any():
    score = torch.ones(3, 2, 2)
    advantage = torch.zeros(3, 2, 2)
    advantage[1] = 0.5
    assert made(score, extra={"advantage": advantage}).useful[:, 0].tolist() == [False, True, False]


def test_the_verdict_of_a_branch_is_the_difference_of_probabilities():
    """tanh(gap / 2) > threshold: 0.3 asks for a gap of 0.619, 0.4 for one of 0.847."""
    scores = torch.tensor([[1.0, 1.62, 1.3, 1.1], [1.0, 1.61, 1.3, 1.1], [2.0, 2.0, 2.0, 2.0]])
    pair, score = best_and_worst(scores, 0.3)
    assert pair[0].tolist() == [1, 0] and score.tolist() == [[1, 0], [0, 0], [0, 0]]
    gap = torch.tensor([[0.0, 0.846], [0.0, 0.848]])
    assert best_and_worst(gap, 0.4)[1][:, 0].tolist() == [0, 1]
    soft = scores[:, [1, 0]].softmax(1)
    assert (soft[:, 0] - soft[:, 1] > 0.3).tolist() == [True, False, False]


def test_only_the_best_and_the_worst_are_kept():
    value = torch.arange(2 * 1 * 3 * 2).reshape(2, 1, 3, 2)
    pair = torch.tensor([[[2, 0]], [[1, 1]]])
    assert only(value, pair).tolist() == [[[[4, 5], [0, 1]]], [[[8, 9], [8, 9]]]]
    assert only(value[..., 0], pair).tolist() == [[[4, 0]], [[8, 8]]]
