"""The online source: contents of batches, exact continuation of rounds, and calls of its parts."""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.samplers import DDIM
from diffalign.errors import Paused, UserError
from diffalign.methods import ddpo, spo
from diffalign.methods._steps import density
from diffalign.methods.d3po import CARD as D3PO_CARD
from diffalign.methods.d3po import D3PO
from diffalign.rewards.specs import Weighted
from diffalign.rollout import noise
from diffalign.rollout.judges import InlineJudge, People
from diffalign.rollout.model import PipelineRolloutModel
from diffalign.rollout.rounds import PromptOrder
from diffalign.rollout.setting import Setting
from diffalign.rollout.store import RoundStore
from tests.rollout.toys import PROMPTS, Script, Studio, World, equal, tied

METHODS = {
    "d3po": ("trajectories", "none", D3PO(), D3PO_CARD),
    "ddpo": ("trajectories", "group", ddpo.DDPO(), ddpo.CARD),
    "spo": ("tree", "none", spo.SPO(), spo.CARD),
}
methods = pytest.mark.parametrize("name", METHODS)


def world(name="d3po", **changes):
    shape, advantage, _, _ = METHODS[name]
    rollout = {"advantage": advantage} | changes.pop("rollout", {})
    return World(shape=shape, rollout=rollout, **changes)


def rows(w, batches):
    """(prompt's row, rival, step's t) -> what a batch without ties holds of it."""
    found = {}
    for micro_step, batch in enumerate(batches):
        first, _ = w.plan.place(micro_step).rows
        rivals = len(batch.group) // batch.num_groups
        for i in range(len(batch.group)):
            place = (first + int(batch.group[i]), i % rivals, round(1000 * float(batch.x.t[i])))
            found[place] = {
                "x_t": batch.x.x_t[i],
                "x_s": batch.x.x_s[i],
                "score": float(batch.score[i]),
                "label": int(batch.cond["label"][i]),
                "advantage": float(batch.extra["advantage"][i]) if "advantage" in batch.extra else None,
            }
    return found


def test_prompts_come_in_an_order_of_their_own_each_epoch():
    w = World()
    seen = [prompt for number in range(9) for prompt in w.source.prompts_of(number)]
    epochs = [tuple(seen[i : i + 6]) for i in range(0, 36, 6)]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs) and len(set(epochs)) > 3
    ranks = [
        World(rollout={"prompts_per_round": 2}, batch_size=1, rank=r, world=2).source.prompts_of(1)
        for r in range(2)
    ]
    assert [ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]] == w.source.prompts_of(1)
    assert World(seed=6).source.prompts_of(0) != w.source.prompts_of(0)


def test_a_batch_is_asked_for_in_evaluation_mode_and_without_gradients():
    w = World(guidance=3.0)
    w.network.train()
    drawn = iter(w.source)
    batch = next(drawn)
    assert w.network.training and {(training, grad) for training, grad, _ in w.policy.seen} == {
        (False, False)
    }
    # 2 parts of 2 prompts, guided: both start from one noise, then 3 samples each
    assert [n for _, _, n in w.policy.seen] == [4, 12, 12, 12] * 2
    assert not any(value.requires_grad for value in (*batch.x, *batch.extra.values()))
    failing = World(judge=Script(fails_at=0))
    failing.network.train()
    with pytest.raises(RuntimeError, match="killed"):
        next(iter(failing.source))
    assert failing.network.training


@pytest.mark.parametrize("shape", ["samples", "trajectories", "tree"])
def test_no_more_samples_go_through_the_network_than_asked_for(shape):
    """Guidance shows it each twice; the noise is drawn outside, so the numbers are those of a whole call."""
    whole, split = (World(shape, {"batch_size": size}, guidance=3.0) for size in (6, 2))
    batches = [w.batches() for w in (whole, split)]
    assert max(n for _, _, n in whole.policy.seen) == 12 and max(n for _, _, n in split.policy.seen) == 4
    for one, other in zip(*batches, strict=True):
        tensors = [list(b.x) if isinstance(b.x, tuple) else [b.x] for b in (one, other)]
        for a, b in zip(*tensors, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(one.score, other.score)


@pytest.mark.parametrize("shared", [True, False])
def test_rivals_start_from_one_noise_if_they_should(shared):
    w = World(rollout={"shared_noise": shared})
    found = rows(w, w.batches())
    for row in range(4):
        one, other = (found[row, rival, 751] for rival in (0, 2))
        assert torch.equal(one["x_t"], other["x_t"]) == shared
        assert not torch.equal(one["x_s"], other["x_s"])
    assert not torch.equal(found[0, 0, 751]["x_t"], found[1, 0, 751]["x_t"])


def test_every_step_has_the_verdict_of_its_image_and_its_own_prompt():
    w = world("ddpo")
    found = rows(w, w.batches())
    assert len(found) == 4 * 3 * 4  # prompts, rivals, steps
    prompts = w.source.prompts_of(0)
    final = np.array([[float(found[row, k, 1]["x_s"][1]) for k in range(3)] for row in range(4)])
    usual, spread = final.mean(1, keepdims=True), final.std(1, ddof=1, keepdims=True)
    for (row, rival, t), here in found.items():
        assert here["score"] == pytest.approx(final[row, rival], abs=1e-7)
        assert here["label"] == int(prompts[row].split()[-1]) % 3
        wanted = ((final - usual) / (spread + 1e-8))[row, rival]
        assert here["advantage"] == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        later = {751: 501, 501: 251, 251: 1}.get(t)
        if later:
            assert torch.equal(here["x_s"], found[row, rival, later]["x_t"])
    assert w.judge.times == [0.0] * 12
    assert w.judge.asked == [[p for p in prompts[i : i + 2] for _ in range(3)] for i in (0, 2)]


def test_a_trees_winner_and_loser_are_the_best_and_the_worst_of_their_branch():
    """The judge is told the time of each estimate; the last verdict is on finished points."""
    w = world("spo")
    assert len(w.batches(3)) == 3
    assert w.judge.times == pytest.approx(([0.251] * 3 + [0.001] * 3 + [0.0] * 3) * 4)
    for batch in w.batches():
        assert batch.score.tolist() == [1, 0] * batch.num_groups
        final = batch.x.s == 0
        heights = batch.x.x_s[final][:, 1].reshape(-1, 2)
        assert bool((heights[:, 0] > heights[:, 1]).all())
        assert torch.equal(batch.x.x_t[0::2], batch.x.x_t[1::2])
        assert torch.equal(batch.state, batch.group * 2)


@methods
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_references_mean_is_what_it_would_say_now(name, guidance):
    w = world(name, guidance=guidance)
    for batch in w.batches():
        asked = w.reference if guidance == 1 else Guided(w.reference, batch.negative, guidance)
        mean, _ = batch.kernel(asked, batch.x.x_t, batch.x.t, batch.x.s, batch.cond)
        torch.testing.assert_close(batch.extra["reference_mean"], mean, atol=1e-5, rtol=1e-5)
        assert batch.guidance == guidance and batch.negative


def test_nobody_asks_a_reference_that_is_not_needed():
    assert "reference_mean" not in World(referred=False).batches(1)[0].extra


@methods
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratio_of_the_first_step_is_one(name, guidance, dtype):
    """The density under the policy that drew is the recorded one: to 1e-6 in float64; in float32 a step of
    std 0.02 turns a rounding of 1e-7 into 1e-5, a tenth of the smallest published clip.
    """
    w = world(name, guidance=guidance, dtype=dtype, moved=0.0)
    policy, (_, _, method, card) = w.copy_of_policy(), METHODS[name]
    for batch in w.batches():
        ratio = (density(policy, batch, card).detach() - batch.x.logp).exp()
        torch.testing.assert_close(
            ratio, torch.ones_like(ratio), atol=1e-6 if dtype == torch.float64 else 2e-5, rtol=0
        )
        step = method(policy, w.reference, batch, torch.Generator())
        assert float(step.metrics["kl"]) == pytest.approx(0, abs=1e-6 if dtype == torch.float64 else 1e-4)
        if name == "ddpo":
            assert float(step.metrics["ratio"]) == pytest.approx(1, abs=2e-5)
        else:
            assert float(step.loss.detach()) == pytest.approx(math.log(2), abs=1e-4)


def test_a_reward_that_knows_time_is_told_when_an_estimate_was_made():
    class Timed:
        def __init__(self):
            self.times = []

        def __call__(self, images, prompts):
            return self.at(images, prompts, torch.zeros(len(images)))

        def at(self, images, prompts, t):
            self.times += t.tolist()
            return torch.arange(len(images)).float()

    reward = Timed()
    w = world("spo", judge=InlineJudge([Weighted("timed", "timed")], [reward]), studio=Studio(pictures=True))
    w.batches(1)
    assert reward.times == pytest.approx(([0.251] * 3 + [0.001] * 3 + [0.0] * 3) * 4)


@methods
def test_groups_that_are_ties_are_left_out(name):
    w = world(name, batch_size=4, judge=tied(*range(0, 6, 2)))
    prompts = w.source.prompts_of(0)
    odd = [int(p.split()[-1]) % 3 for p in prompts if int(p.split()[-1]) % 2]
    assert 0 < len(odd) < 4
    for batch in w.batches():
        assert batch.num_groups == len(odd)
        assert sorted(batch.cond["label"].tolist()) == sorted(odd * (len(batch.group) // len(odd)))
        step = METHODS[name][2](w.copy_of_policy(), w.reference, batch, torch.Generator())
        assert float(step.weight) == len(odd) * (1 if name == "spo" else 3)  # pairs of 3 rivals, or rows


@methods
def test_one_group_stays_and_weighs_nothing_where_all_are_ties(name):
    w = world(name, judge=tied(*range(6)))
    for batch in w.batches():
        assert batch.num_groups == 1
        step = METHODS[name][2](w.copy_of_policy(), w.reference, batch, torch.Generator())
        assert float(step.weight) == 0
    assert w.source.report.figures["rollout/ties"] == 1.0


@pytest.mark.parametrize("shape", ["trajectories", "samples"])
def test_parts_of_a_prompts_samples_are_the_whole(shape):
    """Two at a time of four: every sample comes once, its advantage against all four."""
    rollout = {"samples": 4, "advantage": "group", "eta": 1.0 if shape == "trajectories" else 0.0}
    rollout |= {"shared_noise": False}
    whole = World(shape=shape, rollout=rollout)
    parts = World(shape=shape, rollout=rollout | {"part": 2})

    def found(w):
        here = []
        for batch in w.batches():
            x = batch.x.x_s if shape == "trajectories" else batch.x
            assert len(batch.group) == batch.num_groups * (w.config.part or 4)
            here += [(*a.tolist(), float(b)) for a, b in zip(x, batch.extra["advantage"], strict=True)]
        return here

    assert parts.plan.micro_steps == 2 * whole.plan.micro_steps
    assert sorted(found(parts)) == sorted(found(whole)) and found(parts) != found(whole)


def test_several_rewards_are_compared_by_pareto():
    both = Script(lambda x, prompts, t: torch.stack([x[:, 1], -x[:, 0]], 1), ("up", "left"), (1.0, 1.0))
    w = World(rollout={"combine": "pareto"}, judge=both)
    for batch in w.batches():
        assert batch.score.shape == (len(batch.group), 2)
        step = D3PO()(w.copy_of_policy(), w.reference, batch, torch.Generator())
        pairs = batch.score.reshape(batch.num_groups, 3, 1, 2)
        ahead = (pairs > pairs.transpose(1, 2)).all(-1)
        assert float(step.weight) == int(ahead.sum()) > 0


@methods
@pytest.mark.parametrize("micro_step", [0, 5])
def test_a_round_is_sampled_again_to_the_bit(name, micro_step):
    w = world(name)
    count = w.plan.micro_steps - micro_step
    assert all(map(equal, w.batches(count, micro_step), w.batches()[micro_step:]))
    other = world(name, rollout={"batch_size": 12})  # other parts: other roundings, no other draws
    for one, two in zip(w.batches(), other.batches(), strict=True):
        torch.testing.assert_close(one.x.x_s, two.x.x_s, atol=1e-5, rtol=1e-5)


def parts(folder, number):
    return sorted(p.name for p in (folder / f"round-{number:06d}").glob("*.pt"))


def small(name="d3po", **changes):
    """Parts of one prompt."""
    return world(name, rollout={"batch_size": 3}, **changes)


@methods
def test_a_round_that_was_killed_goes_on_with_what_there_is(name, tmp_path):
    whole = small(name)
    wanted = whole.batches()
    first = small(name, store=RoundStore(tmp_path), judge=Script(fails_at=3))
    with pytest.raises(RuntimeError, match="killed"):
        first.batches()
    assert parts(tmp_path, 0) == [f"part-0-00000{i}.pt" for i in range(3)]
    assert not list(tmp_path.rglob("*.tmp"))
    second = small(name, store=RoundStore(tmp_path))
    assert all(map(equal, second.batches(), wanted))
    assert [asked[0] for asked in second.judge.asked] == whole.source.prompts_of(0)[3:]
    assert 4 * len(second.policy.seen) == len(whole.policy.seen)
    (tmp_path / "round-000000" / "part-0-000001.pt").unlink()  # one in the middle is lost
    assert all(map(equal, small(name, store=RoundStore(tmp_path)).batches(), wanted))
    third = small(name, store=RoundStore(tmp_path), judge=Script(fails_at=0))
    assert all(map(equal, third.batches(), wanted)) and not third.policy.seen


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (0, [0, 1, 2, 3])])
def test_old_rounds_keep_their_scores_alone(tmp_path, keep, left):
    w = world("ddpo", store=RoundStore(tmp_path, keep=keep), rollout={"advantage": "prompt"})
    w.batches(4 * w.plan.micro_steps)
    assert [number for number in range(4) if parts(tmp_path, number)] == left
    for number in range(4):
        folder = tmp_path / f"round-{number:06d}"
        lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == w.source.prompts_of(number)
        assert all(len(line["height"]) == 3 for line in lines)
        assert json.loads((folder / "history.json").read_text())["rewards"]


def test_seeking_back_removes_what_another_policy_will_sample(tmp_path):
    w = World(store=RoundStore(tmp_path))
    w.batches(3 * w.plan.micro_steps)
    w.source.seek(w.plan.micro_steps)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000000", "round-000001"]
    RoundStore(tmp_path, rank=1).forget_after(0)  # the first rank's business
    assert parts(tmp_path, 1)


def test_the_round_that_a_run_was_resumed_in_stays(tmp_path):
    """Its checkpoint may be the newest one when the run is killed for good: its policy did not sample it."""
    w = World(store=RoundStore(tmp_path, keep=1))
    w.batches(3 * w.plan.micro_steps - 3, start=3)
    assert parts(tmp_path, 0) and not parts(tmp_path, 1) and parts(tmp_path, 2)


def test_labels_of_later_rounds_are_moved_aside_not_removed(tmp_path):
    for number in (1, 2):
        (tmp_path / f"round-00000{number}").mkdir()
    labels = tmp_path / "round-000002" / "labels.jsonl"
    labels.write_text("{}\n")
    RoundStore(tmp_path).forget_after(0)
    assert not list(tmp_path.glob("round-*"))
    labels.parent.mkdir()
    labels.write_text("other\n")
    RoundStore(tmp_path).forget_after(0)
    left = sorted(path.read_text() for path in tmp_path.glob("left-round-000002-*/labels.jsonl"))
    assert left == ["other\n", "{}\n"] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kept", [True, False])
def test_statistics_over_rounds_are_those_of_an_uninterrupted_source(tmp_path, kept):
    """18 rewards of a prompt after the fourth round: by then most stand against their own history."""

    def made(folder):
        rollout = {"advantage": "prompt", "prompts_per_round": 6}
        return world("ddpo", rollout=rollout, store=RoundStore(folder if kept else None))

    w = made(tmp_path / "whole")
    whole, count = w.batches(6 * w.plan.micro_steps), w.plan.micro_steps
    final = [rows(w, whole[i : i + count]) for i in range(0, 6 * count, count)]
    heights = {}
    for number, found in enumerate(final):
        prompts = w.source.prompts_of(number)
        scores = np.array([[found[row, k, 1]["score"] for k in range(3)] for row in range(6)])
        for prompt, row in zip(prompts, scores, strict=True):
            heights[prompt] = heights.get(prompt, []) + row.tolist()
        for (row, k, _), here in found.items():
            usual = heights[prompts[row]] if number == 5 else scores
            wanted = (scores[row, k] - np.mean(usual)) / (np.std(usual) + 1e-6)
            assert here["advantage"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    if kept:
        made(tmp_path / "parts").batches(3 * count + 2)
        rest = made(tmp_path / "parts").batches(3 * count - 2, start=3 * count + 2)
        assert all(map(equal, rest, whole[3 * count + 2 :]))


def test_a_judge_that_fails_names_the_prompt(tmp_path):
    def refuses(images, prompts):
        if "prompt 2" in prompts:
            raise RuntimeError("no luck")
        return torch.arange(len(prompts)).float()

    judge = InlineJudge([Weighted("picky", "picky")], [refuses])
    w = small(judge=judge, studio=Studio(pictures=True), store=RoundStore(tmp_path))
    with pytest.raises(UserError, match=r"'picky'.*'prompt 2'.*no luck"):
        w.batches(2 * w.plan.micro_steps)
    kept = len(parts(tmp_path, 0)) + len(parts(tmp_path, 1))
    order = w.source.prompts_of(0) + w.source.prompts_of(1)
    assert kept == order.index("prompt 2")


def test_people_are_waited_for_and_their_scores_are_the_scores(tmp_path):
    def made():
        return World(
            rollout={"by": "people", "batch_size": 3},
            judge=People(),
            studio=Studio(pictures=True),
            store=RoundStore(tmp_path, keep=0),
        )

    first = made()
    with pytest.raises(Paused, match=r"0 of 4 prompts labelled in labels.jsonl.*--resume latest"):
        first.batches()
    folder = tmp_path / "round-000000"
    assert len(list(folder.glob("*.png"))) == 12
    labels = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in labels] == first.source.prompts_of(0)
    for number, line in enumerate(labels):
        line["scores"] = [number, 0, number]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labels))
    second = made()
    batches = second.batches()
    assert not second.policy.seen
    # the first prompt is a tie; of the others the first and the last image are better than the one between
    assert sorted(b.num_groups for b in batches) == [1] * 4 + [2] * 4
    for batch in batches:
        assert bool((batch.score.reshape(-1, 3)[:, 0] > batch.score.reshape(-1, 3)[:, 1]).all())
    assert second.source.report.figures["rollout/people"] == pytest.approx((0 + 2 + 4 + 6) / 12)
    with pytest.raises(Paused):
        second.batches(1, start=second.plan.micro_steps)
    assert (folder / "labels.jsonl").is_file() and parts(tmp_path, 0)


def test_images_are_counted_over_the_run_and_a_judge_is_closed(tmp_path):
    w = World(store=RoundStore(tmp_path))
    w.batches(w.plan.micro_steps + 1)
    assert (w.source.report.round, w.source.report.images) == (1, 24)
    again = World(store=RoundStore(tmp_path))
    again.batches(1, start=w.plan.micro_steps)
    assert again.source.report.images == 24
    assert not w.judge.closed
    w.source.close()
    assert w.judge.closed


def test_encoders_are_where_they_are_quick_while_prompts_are_encoded():
    @dataclass
    class Strict(Studio):
        inside: bool = False

        def encode(self, prompts):
            assert self.inside
            return super().encode(prompts)

        @contextmanager
        def opened(self):
            self.inside = True
            yield
            self.inside = False

    w = World(studio=Strict())
    w.batches()
    assert w.studio.encoded == w.source.prompts_of(0) and not w.studio.inside


@dataclass
class Model:
    """What a studio asks of a loaded model."""

    text_encoders: tuple[str, ...] = ("text_encoder",)
    device: torch.device = torch.device("cpu")
    sources: None = None
    encoded: list[list[str]] = field(default_factory=list)
    negatives: int = 0
    decoded: list[int] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)

    def latent_shape(self, height, width, frames=1):
        return (4, height // 8, width // 8)

    def micro_conditions(self, original, crop, target):
        return {"time_ids": torch.cat([original, crop, target], 1)}

    def encode_prompts(self, prompts):
        self.encoded.append(list(prompts))
        return {"text": torch.tensor([[float(len(p)), float(ord(p[0]))] for p in prompts])}

    def negative(self, n):
        self.negatives += 1
        return {"text": torch.zeros(n, 2)}

    def decode(self, latents):
        self.decoded.append(len(latents))
        return latents[:, :3]

    def move_encoders(self, device, names):
        self.moved.append((str(device), *names))

    def free_encoders(self):
        self.moved.append(("away",))


def test_a_prompt_goes_through_the_text_encoders_once():
    model = Model()
    studio = PipelineRolloutModel(model, (64, 64), batch_size=2)
    assert studio.shape == (4, 8, 8)
    cond, negative = studio.encode(["aa", "b", "aa", "ccc"])
    assert model.encoded == [["aa", "b"], ["ccc"]] and studio.encoded == 3
    assert (
        cond["text"][:, 0].tolist() == [2, 1, 2, 3]
        and cond["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 4
    )
    assert negative["text"].shape == (4, 2) and set(negative) == {"text"}
    studio.encode(["ccc", "dddd", "b"])
    assert model.encoded[2:] == [["dddd"]] and (studio.encoded, model.negatives) == (4, 1)


def test_prompts_of_later_steps_are_looked_up_where_one_is_encoded(monkeypatch):
    """The first micro-batch of two encodes what the next ones need; the second one asks for its own alone."""
    looked_up = []

    class Watched(PromptOrder):
        def __getitem__(self, position):
            looked_up.append(position)
            return super().__getitem__(position)

    monkeypatch.setattr(noise, "PromptOrder", Watched)
    model = Model()
    studio = PipelineRolloutModel(model, (64, 64), batch_size=8)
    setting = Setting(DDIM(0.0), torch.linspace(0.9, 0.0, 3))
    batches = iter(noise.NoiseSource(studio, None, ["a", "bb", "ccc"], setting, groups=2))
    next(batches)
    assert sorted(prompt for some in model.encoded for prompt in some) == ["a", "bb", "ccc"]
    assert looked_up == list(range(2 * noise.AHEAD))
    looked_up.clear()
    next(batches)
    assert looked_up == [2, 3] and studio.encoded == 3


def test_only_so_many_bytes_of_prompts_are_remembered():
    """Room for two; a call of three works, and the two that were used last stay."""
    model = Model()
    row = PipelineRolloutModel(model, (64, 64)).encode(["a"])[0]["text"]
    model.encoded.clear()
    studio = PipelineRolloutModel(model, (64, 64), batch_size=8, budget=2 * row.nbytes)
    first, _ = studio.encode(["a", "bb", "ccc"])
    assert first["text"][:, 0].tolist() == [1, 2, 3]
    studio.encode(["ccc", "bb"])
    assert len(model.encoded) == 1
    studio.encode(["a"])
    assert model.encoded[1:] == [["a"]]
    studio.encode(["bb"])
    assert len(model.encoded) == 2
    studio.encode(["ccc"])
    assert model.encoded[2:] == [["ccc"]]


def test_a_remembered_prompt_holds_no_others():
    """A row of an encoded batch must not keep the batch in memory."""
    model = Model()
    studio = PipelineRolloutModel(model, (64, 64), batch_size=3)
    studio.encode(["a", "bb", "ccc"])
    texts = [rows["text"] for rows in studio._texts.values()]
    assert all(text.untyped_storage().nbytes() == text.nbytes for text in texts)


def test_latents_are_decoded_some_at_a_time_and_encoders_go_away_again():
    model = Model()
    studio = PipelineRolloutModel(model, (64, 64), batch_size=2)
    latents = torch.rand(5, 4, 8, 8)
    assert torch.equal(studio.decode(latents), latents[:, :3]) and model.decoded == [2, 2, 1]
    with pytest.raises(RuntimeError), studio.opened():  # noqa: PT012
        assert model.moved == [("cpu", "vae")]
        raise RuntimeError
    assert model.moved.pop() == ("away",)
    other = PipelineRolloutModel(model, (64, 64), batch_size=8, decoder=lambda x: x[:, 1:])
    assert torch.equal(other.decode(latents), latents[:, 1:])
    with other.opened():
        assert model.moved.pop() == ("cpu",)  # a VAE that does not decode stays where it is
    model.moved.clear()
    studio.encode(["a"])
    studio.encode(["a"])
    assert model.moved == [("cpu", "text_encoder")] * 2  # there and back, for what is new


def test_a_whole_run_encodes_each_prompt_once():
    model = Model()

    @dataclass
    class Plane(Studio):
        texts: PipelineRolloutModel = field(default_factory=lambda: PipelineRolloutModel(model, (64, 64)))

        def encode(self, prompts):
            self.texts.encode(prompts)
            return super().encode(prompts)

    w = replace(World(), studio=Plane())
    w.batches(5 * w.plan.micro_steps)
    assert sorted(p for some in model.encoded for p in some) == sorted(PROMPTS)
