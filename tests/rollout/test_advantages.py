"""Advantages by hand, and a history that continues exactly."""

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.rollout.advantages import KINDS, PromptHistory, advantages
from tests.helpers import VECTORS

SCORES = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
PROMPTS = ["a", "b"]


def test_group_is_against_its_rivals():
    # mean 3, deviations -2 -1 3, variance 14 / 2 = 7
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0, 0, 0]]) / 7**0.5
    torch.testing.assert_close(advantages(SCORES, PROMPTS, "group"), expected)


def test_group_batch_shares_one_std():
    # all: mean 3.5, squares 2.5^2 + 1.5^2 + 2.5^2 + 3 / 4 = 15.5, of 6
    std = (15.5 / 6) ** 0.5
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0, 0, 0]]) / (std + 1e-4)
    torch.testing.assert_close(advantages(SCORES, PROMPTS, "group_batch"), expected)


def test_group_std_divides_by_the_number_of_rivals():
    # mean 3, squares 4 1 9, of 3
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0, 0, 0]]) / ((14 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(advantages(SCORES, PROMPTS, "group_std"), expected)


def test_raw_best_and_ends():
    """Equally good ones are all best; of equally good or bad ends the first counts; a tie has none."""
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert torch.equal(advantages(scores, PROMPTS, "raw"), scores)
    assert advantages(scores, PROMPTS, "best").tolist() == [[0, 1, 1, 0, 0], [1] * 5]
    assert advantages(scores, PROMPTS, "ends").tolist() == [[0, 1, 0, -1, 0], [0] * 5]


def by_groups(rewards, groups, kind):
    """Return the advantages of ragged groups, group by group; "group_batch" divides by the std of all."""
    found = np.empty_like(rewards)
    for group in np.unique(groups):
        row = torch.tensor(rewards[groups == group])[None]
        name = "group_std" if kind == "group_batch" else kind
        own = advantages(row, ["p"], name)[0].numpy()
        if kind == "group_batch":
            own = own * (row.numpy().std() + 1e-4) / (rewards.std() + 1e-4)
        found[groups == group] = own
    return found


FLOW_DPO, AWM = (VECTORS / f"{name}.npz" for name in ("flow_dpo", "awm"))


@pytest.mark.parametrize("std", ["globalstd", "groupstd"])
@pytest.mark.parametrize(("theirs", "kind"), [("grpo", ""), ("rwr", "raw"), ("sft", "best"), ("dpo", "ends")])
def test_advantages_against_flow_grpos_code(theirs, kind, std):
    f = np.load(FLOW_DPO)
    if f"adv_{theirs}_{std}" not in f or "adv_rewards" not in f:
        pytest.skip(f"among the shipped vectors there is no adv_{theirs}_{std}")
    rewards, groups = f["adv_rewards"].astype(np.float64).reshape(-1), f["adv_group_id"].reshape(-1)
    kind = kind or ("group_batch" if std == "globalstd" else "group_std")
    expected = f[f"adv_{theirs}_{std}"].astype(np.float64).reshape(-1)
    if theirs == "dpo":  # all-equal groups are a pair of noise there, a tie here
        for group in np.unique(groups):
            if len(np.unique(rewards[groups == group])) == 1:
                expected[groups == group] = 0
    np.testing.assert_allclose(by_groups(rewards, groups, kind), expected, atol=1e-10)


@pytest.mark.parametrize(("name", "kind"), [("adv_globalstd", "group_batch"), ("adv_groupstd", "group_std")])
def test_advantages_against_awms_code(name, kind):
    f = np.load(AWM)
    if name not in f:
        pytest.skip(f"among the shipped vectors there is no {name}")
    found = advantages(torch.from_numpy(f["adv_rewards"]).reshape(2, 4), PROMPTS, kind)
    np.testing.assert_allclose(found.reshape(-1), f[name].reshape(-1), atol=1e-10)


def test_batch_is_against_all():
    expected = torch.tensor([[-2.5, -1.5, 2.5], [0.5, 0.5, 0.5]]) / ((15.5 / 6) ** 0.5 + 1e-8)
    torch.testing.assert_close(advantages(SCORES, PROMPTS, "batch"), expected)


@pytest.mark.parametrize("kind", ["group", "group_batch"])
def test_a_tie_is_exactly_zero_whatever_rounding_does(kind):
    scores = torch.full((2, 7), 0.1)
    scores[1, 0] = 1.0
    assert advantages(scores, PROMPTS, kind)[0].tolist() == [0.0] * 7


def test_one_sample_of_a_prompt_has_no_rivals():
    assert advantages(torch.tensor([[1.0], [3.0]]), PROMPTS, "group").tolist() == [[0.0], [0.0]]
    assert advantages(torch.tensor([[1.0], [3.0]]), PROMPTS, "batch").tolist() == [[-1.0], [1.0]]


def test_prompt_stands_against_the_batch_until_it_has_sixteen():
    random = np.random.default_rng(0)
    seen, history = {"a": [], "b": []}, PromptHistory()
    for number in range(12):
        scores = random.normal(size=(2, 3))
        history = history.add(PROMPTS, torch.tensor(scores))
        expected = []
        for prompt, row in zip(PROMPTS, scores, strict=True):
            seen[prompt] = (seen[prompt] + row.tolist())[-32:]
            usual = np.array(seen[prompt]) if 3 * (number + 1) >= 16 else scores
            expected.append((row - usual.mean()) / (usual.std() + 1e-6))
        found = advantages(torch.tensor(scores), PROMPTS, "prompt", history)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert len(history.rewards["a"]) == 32


def test_a_prompt_that_comes_twice_has_one_history():
    rows = torch.arange(16.0).reshape(2, 8)
    history = PromptHistory().add(["a", "a"], rows)
    assert history.rewards["a"] == tuple(map(float, range(16)))
    expected = (rows - 7.5) / (rows.std(correction=0) + 1e-6)
    torch.testing.assert_close(advantages(rows, ["a", "a"], "prompt", history), expected)


def test_without_a_history_it_starts_with_these_scores():
    assert torch.equal(
        advantages(SCORES, PROMPTS, "prompt"),
        advantages(SCORES, PROMPTS, "prompt", PromptHistory().add(PROMPTS, SCORES)),
    )


def test_history_is_a_value_and_json_keeps_it_exactly():
    first = PromptHistory().add(["é\u2028"], torch.tensor([[0.1, 1 / 3]], dtype=torch.float64))
    second = first.add(["é\u2028"], torch.tensor([[1e-300]], dtype=torch.float64))
    assert first.rewards["é\u2028"] == (0.1, 1 / 3)
    assert PromptHistory.from_json(second.to_json()) == second
    assert PromptHistory.from_json(PromptHistory(size=4, least=2).to_json()) == PromptHistory({}, 4, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_dtypes_stay(kind):
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = advantages(scores, list("abcde"), kind)
    assert found.shape == scores.shape and found.dtype == scores.dtype and bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("scores", "kind", "words"),
    [
        (torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), "group", ["'b'", "nan"]),
        (torch.tensor([[1.0, float("inf")], [0.0, 0.0]]), "prompt", ["'a'", "inf"]),
        (SCORES, "grup", ["grup", "did you mean group"]),
        (SCORES, "none", ["none", "allowed: batch, best, ends, group, group_batch, group_std, prompt, raw"]),
        (SCORES[:1], "batch", ["(1, 3)", "2 prompts"]),
    ],
)
def test_what_is_refused(scores, kind, words):
    with pytest.raises(UserError) as error:
        advantages(scores, PROMPTS, kind)
    assert all(word in str(error.value) for word in words)


def test_a_history_takes_no_nan():
    with pytest.raises(UserError, match="'b'"):
        PromptHistory().add(PROMPTS, torch.tensor([[1.0], [float("nan")]]))
