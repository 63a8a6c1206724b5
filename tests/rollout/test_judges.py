"""Judges: specs, how scores are combined, failures, and the process beside. Localhost only."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign import rewards
from diffalign.config.schema import RolloutConfig
from diffalign.data.encoding.rating import wins
from diffalign.errors import UserError
from diffalign.rewards.registry import parse
from diffalign.rewards.serving.server import RewardServer, Served
from diffalign.rewards.specs import Weighted, all_weighted, weighted
from diffalign.rollout.judges import InlineJudge, Judge, People, ProcessJudge, combined, judge_of
from diffalign.tiny import scenes
from tests.rewards.test_server import Fails, Gives, Timed, answering, running

PIXELS = torch.full((2, 3, 4, 4), 0.5)
PROMPTS = ["a cat", "a dog"]
NOW = torch.zeros(2)


class Sometimes:
    """Answers of a script, one a call: scores to return or an error to raise; the last one for ever."""

    def __init__(self, *script):
        self.script, self.calls = list(script), 0

    def __call__(self, images, prompts):
        self.calls += 1
        answer = self.script[min(self.calls, len(self.script)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return torch.tensor(answer)


def inline(*rivals):
    names = [Weighted(f"r{i}", f"r{i}") for i in range(len(rivals))]
    return InlineJudge(names, rivals)


@pytest.fixture(scope="module")
def drawn():
    random = np.random.default_rng(0)
    captions = list(scenes.split_captions("test")[:6])
    images = [np.array(scenes.render(scenes.scene_of(c, random))) for c in captions]
    pixels = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i in images]).float() / 255
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + 0.02 * noise).clamp(0, 1), captions[1:] + captions[:1]


@pytest.fixture(scope="module")
def process():
    judge = ProcessJudge(all_weighted(["0.5*judge", "taste"]), pause=0.01)
    yield judge
    judge.close()
    assert judge._process is not None and not alive(judge._process.pid)


def alive(pid):
    """Whether a process is there, and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, seconds=15.0):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("judge", Weighted("judge", "judge", 1.0)),
        ("0.5*pickscore", Weighted("pickscore", "pickscore", 0.5)),
        (" -2e-1 * jpeg ", Weighted("jpeg", "jpeg", -0.2)),
        ("pickscore:/x*y", Weighted("pickscore", "pickscore:/x*y", 1.0)),
        ("3*pickscore:/x*y", Weighted("pickscore", "pickscore:/x*y", 3.0)),
        ("http://127.0.0.1:8765/judge", Weighted("judge", "http://127.0.0.1:8765/judge", 1.0)),
        ("0.5*https://h/a/b", Weighted("b", "https://h/a/b", 0.5)),
    ],
)
def test_specs(text, expected):
    assert weighted(text) == expected


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["half*judge"], ["'half*judge'", "'half'", "finite number"]),
        (["0*judge"], ["'0'"]),
        (["nan*judge"], ["'nan'"]),
        (["0.5*jugde"], ["did you mean judge"]),
        (["0.5*"], ["unknown reward"]),
        (["0.5*http://h"], ["no address"]),
        (["judge", "2*judge"], ["'judge' twice"]),
        ([], ["rollout.rewards is empty"]),
    ],
)
def test_bad_specs(texts, words):
    with pytest.raises(UserError) as error:
        all_weighted(texts)
    assert all(word in str(error.value) for word in words)


def test_specs_need_no_torch():
    code = "import sys, diffalign.rewards.specs as s;"
    code += "print(s.weighted('2*judge').weight, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.0", "False"]


# (N, S, K, R) = (2, 1, 3, 2)
SCORES = torch.tensor([[[[1.0, 10], [2, 10], [3, 40]]], [[[0.0, 20], [0, 0], [6, 40]]]])


def test_sum_is_weighted():
    found = combined(SCORES, (2.0, -0.1), RolloutConfig())
    torch.testing.assert_close(found, torch.tensor([[[1.0, 3, 2]], [[-2.0, 0, 8]]]))


def test_wins_are_shares_of_comparisons():
    found = combined(SCORES, (1.0, 1.0), RolloutConfig(combine="wins"))
    # first prompt: 0 of 2 and 0 of 2; 1 and 0 (a tie is not won); 2 and 2
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.25, 1.0]], [[0.25, 0.0, 1.0]]]))
    expected = [wins(tuple(map(tuple, group.tolist()))) for group in SCORES[:, 0]]
    torch.testing.assert_close(found[:, 0], torch.tensor(expected))


def test_ranks_give_half_for_equal_scores():
    found = combined(SCORES, (1.0, 1.0), RolloutConfig(combine="rank"))
    torch.testing.assert_close(found, torch.tensor([[[0.125, 0.375, 1.0]], [[0.375, 0.125, 1.0]]]))


def test_weights_of_wins_and_the_sign():
    found = combined(SCORES, (3.0, -1.0), RolloutConfig(combine="wins"))
    # r0 wins 0, 1/2, 1 and r1 turned round 1/2, 1/2, 0
    torch.testing.assert_close(found[0, 0], torch.tensor([0.125, 0.5, 0.75]))


def test_pareto_leaves_the_columns_but_for_their_sign():
    config = RolloutConfig(combine="pareto")
    assert torch.equal(combined(SCORES, (1.0, 0.5), config), SCORES)
    assert torch.equal(combined(SCORES, (1.0, -0.5), config), SCORES * torch.tensor([1.0, -1]))


def test_a_round_is_standardised_reward_by_reward():
    config = RolloutConfig(normalise="round", combine="pareto")
    found = combined(SCORES, (1.0, 1.0), config).reshape(-1, 2).numpy()
    flat = SCORES.reshape(-1, 2).numpy()
    np.testing.assert_allclose(found, (flat - flat.mean(0)) / flat.std(0), rtol=1e-6)
    summed = combined(SCORES, (1.0, 2.0), replace(config, combine="sum"))
    np.testing.assert_allclose(summed.flatten(), found @ np.array([1.0, 2.0]), rtol=1e-5, atol=1e-6)


def test_a_reward_that_is_the_same_everywhere_becomes_zero():
    scores = torch.stack([torch.arange(6.0), torch.full((6,), 0.1)], -1).reshape(2, 1, 3, 2)
    found = combined(scores, (1.0, 1.0), RolloutConfig(normalise="round", combine="pareto"))
    assert found[..., 1].eq(0).all() and found[..., 0].std() > 0.9


def test_weights_are_as_many_as_rewards():
    with pytest.raises(ValueError, match="1 weights"):
        combined(SCORES, (1.0,), RolloutConfig())


def test_inline_is_done_at_once_and_scores_the_saved_image(drawn):
    pixels, captions = drawn
    judge = judge_of(RolloutConfig(rewards=("judge", "-0.5*taste")), torch.device("cpu"))
    assert isinstance(judge, Judge)
    assert (judge.rewards, judge.weights) == (("judge", "taste"), (1.0, -0.5))
    future = judge.submit(pixels, captions, torch.zeros(6))
    assert future.done()
    found = future.result()
    assert found.shape == (6, 2) and found.dtype == torch.float32
    assert torch.equal(found[:, 0], rewards.load("judge")(pixels, captions))
    judge.close()


@pytest.mark.parametrize("of", ["judge", "pattern_judge", "video_content", "ensemble"])
def test_prompts_that_a_reward_cannot_score_are_told_before_sampling(of: str, tmp_path: Path) -> None:
    spec = of
    if of == "ensemble":
        file = tmp_path / "two.yaml"
        file.write_text("members: [{reward: taste, weight: 1.0}, {reward: judge, weight: 1.0}]\n")
        spec = f"ensemble:{file}"
    config = RolloutConfig(rewards=("jpeg", spec) if of != "video_content" else (spec,))
    fps = 8 if of == "video_content" else None
    with pytest.raises(UserError, match=r"cannot read the prompt 'a cat'"):
        judge_of(config, "cpu", fps=fps, prompts=["a cat"])
    judge_of(RolloutConfig(rewards=("taste", "jpeg")), "cpu", prompts=["a cat"]).close()


def test_time_is_told_to_those_who_know_it():
    found = inline(Timed(), Gives([1.0, 2.0])).submit(PIXELS, PROMPTS, torch.tensor([0.0, 0.7])).result()
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0], [7.0, 2.0]]))


@pytest.mark.parametrize("first", [RuntimeError("busy"), [math.nan, 1.0], [1.0], [[1.0, 2.0]]])
def test_inline_tries_once_more(first):
    reward = Sometimes(first, [3.0, 4.0])
    assert inline(reward).submit(PIXELS, PROMPTS, NOW).result().tolist() == [[3.0], [4.0]]
    assert reward.calls == 2


@pytest.mark.parametrize(
    ("answer", "words", "calls"),
    [
        (RuntimeError("no luck"), ["'a cat', 'a dog'", "RuntimeError: no luck", "2 tries"], 2),
        ([1.0, math.inf], ["prompt 'a dog'", "inf"], 2),
        ([1.0], ["(1,) for 2 images"], 2),
        (UserError("cannot read 'a cat'"), ["cannot read 'a cat'"], 1),
    ],
)
def test_inline_failures_name_reward_and_prompt(answer, words, calls):
    reward = Sometimes(answer)
    with pytest.raises(UserError) as error:
        inline(Gives([1.0, 1.0]), reward).submit(PIXELS, PROMPTS, NOW).result()
    assert all(word in str(error.value) for word in words) and reward.calls == calls
    assert "'r1'" in str(error.value) or calls == 1


def test_people_are_not_asked_by_submit():
    judge = judge_of(RolloutConfig(by="people"), "cpu")
    assert isinstance(judge, People) and isinstance(judge, Judge)
    assert len(judge.rewards) == len(judge.weights) == 1
    with pytest.raises(ValueError, match="people"):
        judge.submit(PIXELS, PROMPTS, NOW)


def test_counts_must_fit(process):
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        inline(Gives([1.0, 1.0])).submit(PIXELS, ["a"], NOW).result()
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        process.submit(PIXELS, ["a"], NOW)


def test_the_process_gives_the_scores_of_inline(process, drawn):
    pixels, captions = drawn
    here = judge_of(RolloutConfig(rewards=("0.5*judge", "taste")), "cpu")
    assert (process.rewards, process.weights) == (here.rewards, here.weights)
    futures = [process.submit(pixels[i:], captions[i:], torch.zeros(6 - i)) for i in range(5)]
    for i, future in enumerate(futures):
        assert torch.equal(
            future.result(60), here.submit(pixels[i:], captions[i:], torch.zeros(6 - i)).result()
        )


def test_the_process_names_the_prompt_it_cannot_read(process):
    with pytest.raises(UserError, match=r"status 422.*'a cat'"):
        process.submit(PIXELS, PROMPTS, NOW).result(60)


def test_an_address_needs_no_process():
    card = parse("judge")[0]
    with running(
        RewardServer({"timed": Served(card, Timed()), "fails": Served(card, Fails())}, port=0)
    ) as where:
        judge = ProcessJudge(all_weighted([f"2*{where}/timed"]))
        t = torch.tensor([0.0, 0.5])
        assert judge._process is None and judge.weights == (2.0,)
        assert judge.submit(PIXELS, PROMPTS, t).result(60).tolist() == [[0.0], [5.0]]
        judge.close()
        failing = ProcessJudge(all_weighted([f"{where}/fails"]), pause=0.001)
        with pytest.raises(UserError, match=r"'a cat', 'a dog' .4 tries.*no luck"):
            failing.submit(PIXELS, PROMPTS, NOW).result(60)
        failing.close()


def test_scoring_overlaps_what_comes_next():
    free = threading.Event()

    class Slow:
        def __call__(self, images, prompts):
            assert free.wait(30)
            return torch.ones(len(images))

    with running(RewardServer({"slow": Served(parse("judge")[0], Slow())}, port=0)) as where:
        judge = ProcessJudge(all_weighted([f"{where}/slow"]))
        future = judge.submit(PIXELS, PROMPTS, NOW)
        assert not future.done()
        free.set()
        assert future.result(60).tolist() == [[1.0], [1.0]]
        judge.close()


def test_a_remote_failure_that_passes():
    with answering((500, b""), (500, b""), (200, b'{"scores": [1, 2]}')) as (url, asked):
        judge = ProcessJudge([Weighted("fake", url)], pause=0.001)
        assert judge.submit(PIXELS, PROMPTS, NOW).result(60).tolist() == [[1.0], [2.0]]
        judge.close()
    assert len(asked) == 3 and asked[0]["t"] == [0.0, 0.0]


def test_a_process_that_dies_is_named():
    judge = ProcessJudge(all_weighted(["judge"]), pause=0.001)
    assert judge._process is not None
    os.kill(judge._process.pid, signal.SIGKILL)
    assert gone(judge._process.pid)
    with pytest.raises(UserError) as error:
        judge.submit(PIXELS, PROMPTS, NOW).result(60)
    assert all(word in str(error.value) for word in ("'judge'", "'a cat', 'a dog'", "ended with status -9"))
    judge.close()


def test_a_process_that_cannot_start_says_why(tmp_path):
    with pytest.raises(UserError, match=r"ended with status 2: error: .*nothing"):
        ProcessJudge([Weighted("tiny_clip", f"tiny_clip:{tmp_path}/nothing")])


PARENT = """
import os, signal, sys
from diffalign.rollout.worker import RewardProcess
process = RewardProcess(["judge"])
print(process.pid, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_the_process_ends_with_its_parent(how):
    done = subprocess.run([sys.executable, "-c", PARENT, how], capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    assert gone(int(done.stdout))


def test_interruption_ends_the_command_cleanly():
    command = [sys.executable, "-m", "diffalign", "serve-rewards", "--rewards", "judge", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell that starts something in the background lets it ignore interruptions, and what that starts
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, preexec_fn=heard) as served:
        address = served.stdout.readline().strip()
        served.send_signal(signal.SIGINT)
        try:
            words = served.communicate(timeout=60)[1]
        finally:
            served.kill()
    assert address.startswith("http://127.0.0.1:") and served.returncode == 0
    assert f"{address}/judge" in words and "Traceback" not in words
