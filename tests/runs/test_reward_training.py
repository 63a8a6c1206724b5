"""Training the step-aware preference model: its loss by hand, whole runs on the tiny world, its command."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from diffalign import rewards, tiny
from diffalign.cli import main
from diffalign.cli.train_reward import read
from diffalign.config.files import shipped_configs
from diffalign.config.io import to_yaml
from diffalign.config.schema import Run
from diffalign.diffusion.paths import VariancePreserving
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.losses.reward_model import labelled_choice, weighted_mean
from diffalign.runs.reward.accuracy import AccuracyByTime
from diffalign.runs.reward.job import readied, start, train_reward
from diffalign.runs.reward.method import TOKENS, StepAwareTraining, Timed
from diffalign.runs.reward.validate import MEANINGLESS, validate
from diffalign.training.acceleration import accelerator_for
from diffalign.types import Batch
from diffalign.utils.lock import locked
from tests.helpers import Affine, GivenTimes, sd_path, under_torchrun

WEIGHTS = "step_aware.safetensors"


def silent(line):
    pass


def small(output, *flags):
    """Two steps on forty pairs."""
    fixed = ["--data.limit", "40", "--data.holdout", "0.2", "--data.cache_batch_size", "16"]
    steps = ["--training.steps", "2", "--training.batch_size", "4", "--optimizer.schedule", "constant"]
    warm = ["--optimizer.warmup_steps", "0", "--checkpoint.every", "1", "--reward.evaluated", "0.0,0.5"]
    warm += ["--training.ema_decay", "0"]
    return read(["tiny_reward", *fixed, *steps, *warm, "--output", str(output), *flags])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    run = small(tmp_path_factory.mktemp("reward") / "one")
    return run, train_reward(run, silent)


def shared_cache(done):
    return ("--data.cache_dir", f"{done[0].output}/cache")


# The loss


def test_the_loss_by_hand():
    first, second = torch.tensor([2.0, 0.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    label = torch.tensor([1.0, 1.0, 0.5, 0.5])
    losses = labelled_choice(first, second, label, 1 - label)
    wanted = [
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(1)),
        0.0,  # a perfect tie costs nothing
        0.5 * math.log(1 + math.exp(-2)) + 0.5 * math.log(1 + math.exp(2)) - math.log(2),
    ]
    torch.testing.assert_close(losses, torch.tensor(wanted))


def test_the_loss_and_its_gradient_from_features_in_numpy():
    """The released criterion's inputs: unit features, exp(logit_scale), labels, examples per prompt."""
    random = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    text, one, two = (unit(random.normal(size=(5, 6))) for _ in range(3))
    scale, examples = 7.0, np.array([1.0, 3, 2, 1, 8])
    l0 = np.array([1.0, 0.0, 0.5, 1.0, 0.5])
    scores = scale * np.stack([(text * one).sum(-1), (text * two).sum(-1)], axis=-1)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    each = -l0 * log_p[:, 0] - (1 - l0) * log_p[:, 1] + np.where(l0 == 0.5, np.log(0.5), 0)
    weight = (1 / examples) / (1 / examples).sum()
    gradient = (weight * (np.exp(log_p[:, 0]) - l0))[:, None] * scale * text

    leaf = torch.tensor(one, requires_grad=True)
    s0, s1 = (scale * (torch.tensor(text) * image).sum(-1) for image in (leaf, torch.tensor(two)))
    label = torch.tensor(l0)
    loss = weighted_mean(labelled_choice(s0, s1, label, 1 - label), 1 / torch.tensor(examples))
    loss.backward()
    assert loss.item() == pytest.approx(float((weight * each).sum()), abs=1e-12)
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, atol=1e-12)


def test_no_pairs_weigh_nothing_and_keep_a_gradient_path():
    scores = torch.zeros(0, requires_grad=True)
    loss = weighted_mean(labelled_choice(scores, scores, scores, scores), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("threshold", "gap", "label"),
    [
        (0.0, 1.0, 1.0),
        (0.0, -1e-6, 0.0),
        (0.0, 0.0, 0.5),
        (0.1, 0.19, 0.5),
        (0.1, 0.21, 1.0),
        (0.1, -0.21, 0.0),
    ],
)
def test_labels_are_ties_below_the_threshold_of_the_softmax(threshold, gap, label):
    """PickScore's labels for SDXL: |p0 - p1| > 0.1, where p is the softmax of two scores."""
    p0 = 1 / (1 + math.exp(-gap))
    assert (abs(p0 - (1 - p0)) > threshold) == (label != 0.5)
    method = StepAwareTraining(decode=lambda x: x, threshold=threshold)
    assert (
        method.label(torch.tensor([20.0 + gap], dtype=torch.float64), torch.tensor([20.0]).double()) == label
    )


# The method on a world of one's own


class Says:
    """A policy whose score is a sum over its pixels, and that keeps what it was asked."""

    def __init__(self):
        self.weight = torch.linspace(-1, 1, 12, dtype=torch.float64).requires_grad_()

    def __call__(self, pixels, t, tokens, group):
        self.asked = (pixels, t, tokens, group)
        return pixels.flatten(1) @ self.weight


def toy_batch(weight=None, scores=(1.0, 0.0, 0.0, 1.0, 0.5, 0.5)):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    cond = {"text": draw(6, 2), TOKENS: torch.arange(6)[:, None]}
    return Batch(
        draw(6, 3, 2, 2),
        cond,
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.tensor(scores, dtype=torch.float64),
        {"text": draw(6, 2)},
        {} if weight is None else {"weight": torch.tensor(weight, dtype=torch.float64)},
    )


def frozen():
    return Affine(sd_path(), torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))


def test_estimates_are_guided_share_noise_and_are_made_in_one_step():
    batch, reference, times = toy_batch(), frozen(), (0.1, 0.5, 0.9)
    method = StepAwareTraining(lambda x: x, guidance=5.0, time=GivenTimes(times), at_once=4)
    assert isinstance(reference.path, VariancePreserving)
    policy = Says()
    method(policy, reference, batch, Streams([1, 2, 3]))
    pixels, t, tokens, group = policy.asked
    assert t.tolist() == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.9, 0.9])
    assert torch.equal(group, batch.group) and torch.equal(tokens, batch.cond[TOKENS])
    noise = Streams([1, 2, 3]).normal(3, (3, 2, 2)).double()
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for i in range(6):
        time = times[i // 2]
        alpha, sigma = math.sqrt(alphas[round(1000 * time)]), math.sqrt(1 - alphas[round(1000 * time)])
        x_t = alpha * batch.x[i] + sigma * noise[i // 2]
        eps = lambda text, x=x_t, time=time: (0.3 + time / 2) * x + 0.1 + float(text.mean())  # noqa: E731
        bare, told = eps(batch.negative["text"][i]), eps(batch.cond["text"][i])
        wanted = (x_t - sigma * (bare + 5 * (told - bare))) / alpha
        torch.testing.assert_close(pixels[i], wanted, rtol=1e-5, atol=1e-5)
    assert not pixels.requires_grad


def test_pairs_weigh_one_over_their_prompts_examples_ties_too():
    batch, reference = toy_batch([1, 1, 0.25, 0.25, 0.5, 0.5]), frozen()
    method = StepAwareTraining(lambda x: x, guidance=1.0, time=GivenTimes((0.1, 0.5, 0.9)))
    policy = Says()
    step = method(policy, reference, batch, Streams([1, 2, 3]))
    scores = (policy.asked[0].flatten(1) @ policy.weight).detach().numpy()
    gap = scores[::2] - scores[1::2]
    each = [
        np.log1p(np.exp(-gap[0])),
        np.log1p(np.exp(gap[1])),
        0.5 * np.log1p(np.exp(-gap[2])) + 0.5 * np.log1p(np.exp(gap[2])) - math.log(2),
    ]
    assert float(step.weight) == pytest.approx(1.75)
    assert step.loss.item() == pytest.approx(np.dot(each, [1, 0.25, 0.5]) / 1.75, abs=1e-10)
    step.loss.backward()
    assert policy.weight.grad.abs().sum() > 0
    right = [float(gap[0] > 0), float(gap[1] < 0), 0.5]
    assert float(step.metrics["accuracy"]) == pytest.approx(np.dot(right, [1, 0.25, 0.5]) / 1.75)


def test_a_batch_in_two_is_the_same_gradient():
    batch, reference = toy_batch([1, 1, 0.25, 0.25, 0.5, 0.5]), frozen()
    method = StepAwareTraining(lambda x: x, guidance=2.0, time=GivenTimes((0.1, 0.5, 0.9)))
    whole = Says()
    step = method(whole, reference, batch, Streams([1, 2, 3]))
    step.loss.backward()
    parts = Says()
    total = 0.0
    for members, seeds, times in (([0, 1], [1], (0.1,)), ([2, 3, 4, 5], [2, 3], (0.5, 0.9))):
        group = torch.tensor([m // 2 for m in range(len(members))])
        part = replace(batch.select(torch.tensor(members)), group=group)
        one = replace(method, time=GivenTimes(times))(parts, reference, part, Streams(seeds))
        (one.loss * one.weight).backward()
        total += float(one.weight)
    torch.testing.assert_close(parts.weight.grad / total, whole.weight.grad)


# Whole runs on the tiny world


def test_a_run_leaves_a_reward_and_its_summary(done):
    run, result = done
    assert (result.steps, result.interrupted, result.pairs) == (2, False, 8)
    summary = json.loads((result.output / "summary.json").read_text())
    assert list(summary["accuracy_before"]) == list(summary["accuracy_after"]) == ["0", "0.5"]
    assert read([str(result.output / "config.yaml")]) == run
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert "heldout/accuracy/0.5" in rows[-1]
    reward = rewards.load(f"step_aware:{run.output}")
    images, prompts = torch.rand(2, 3, 32, 32), tiny.prompts("test", 2)
    now = reward.at(images, prompts, torch.tensor([0.2, 0.9]))
    assert not torch.equal(now, rewards.load("tiny_clip")(images, prompts))
    trained = load_file(result.output / "checkpoints" / "step-2" / "trainable.safetensors")
    saved = load_file(result.output / "reward" / WEIGHTS)
    assert trained.keys() == saved.keys() and all(torch.equal(trained[k], saved[k]) for k in saved)


def test_what_it_starts_from_is_measured_as_the_clip_that_it_is(done):
    """Accuracy before training at time 0 is tiny_clip's own, counted here image by image."""
    run, result = done
    from diffalign.data import encode_preferences, fixed_batches, read_preferences, split_holdout
    from diffalign.models.loading import load

    model = load(run.model)
    encoded = encode_preferences(
        model, read_preferences(run.data, 0), run.data, Path(run.output) / "cache", half=False
    )
    held_out = split_holdout(encoded, run.data.holdout, run.data.max_holdout, 0)[1]
    clip, right, total = rewards.load("tiny_clip"), 0.0, 0
    records = iter(held_out)
    for batch in fixed_batches(held_out, model.family, run.data, 1, 0):
        record = next(records)
        scores = clip(model.decode(batch.x), [record.prompt] * 2)
        if record.scores[0] != record.scores[1]:
            right += float((scores[0] > scores[1]) == (record.scores[0] > record.scores[1]))
            total += 1
    assert result.before["0"] == pytest.approx(right / total, abs=0.5 / total)


def test_one_step_and_one_more_are_two_bit_for_bit(done, tmp_path):
    _run, result = done
    halved = small(tmp_path / "halved", *shared_cache(done))
    train_reward(replace(halved, training=replace(halved.training, steps=1)), silent)
    resumed = train_reward(replace(halved, resume="latest"), silent)
    assert resumed.steps == 2
    one, other = (r / "reward" / WEIGHTS for r in (result.output, resumed.output))
    assert one.read_bytes() == other.read_bytes()
    assert resumed.after == result.after and resumed.before == result.before


def test_prompts_are_counted_and_spoken(done):
    run, _ = done
    from diffalign.data import encode_preferences, read_preferences
    from diffalign.models.loading import load

    model, clip = load(run.model), start(run, "cpu")
    encoded = encode_preferences(
        model, read_preferences(run.data, 0), run.data, Path(run.output) / "cache", half=False
    )
    twice = encoded.holding([*encoded, encoded[0]])
    ready = readied(twice, clip)
    assert [r.weight for r in ready][:2] == [0.5, 1.0] and ready[40].weight == 0.5
    tokens = ready.text(ready[3])[TOKENS]
    assert torch.equal(tokens, clip.tokens([ready[3].prompt])[0])
    assert TOKENS in ready.subset([1, 2]).text(ready[1])
    with pytest.raises(UserError, match="no two images of one prompt"):
        readied(encoded.holding([replace(encoded[0], images=encoded[0].images[:1])]), clip)


def test_without_held_out_pairs_nothing_is_measured(done):
    method = StepAwareTraining(lambda x: x)
    hook = AccuracyByTime(method, frozen(), [], (0.0,))
    clip = start(done[0], "cpu")
    assert hook.measure(Timed(clip.model, clip), accelerator_for(done[0].training)) == {}


@pytest.mark.slow
def test_two_processes_are_one_of_twice_the_batch(done, tmp_path):
    _run, _ = done
    one = small(tmp_path / "one", *shared_cache(done))
    train_reward(one, silent)
    flags = [*shared_cache(done), "--training.batch_size", "2", "--output", str(tmp_path / "two")]
    (tmp_path / "two.yaml").write_text(to_yaml(small(tmp_path / "two", *flags)))
    under_torchrun("diffalign", "train-reward", tmp_path / "two.yaml")
    # Of the first step's gradient, since Adam makes a whole step of what is nothing but rounding.
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "step-1" / "optimizer.pt", weights_only=True)["state"]
        for name in ("one", "two")
    )
    size = max(float(state["exp_avg"].abs().max()) for state in first.values())
    off = max(float((first[k]["exp_avg"] - second[k]["exp_avg"]).abs().max()) for k in first)
    assert size > 1e-3 and off < 1e-5 * size
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["accuracy_before"] == summaries[1]["accuracy_before"]


# The command and its configuration


def test_recipes_load_and_say_what_they_are():
    names = shipped_configs("rewards")
    assert set(names) == {"tiny_reward", "sd15_step_aware", "sdxl_step_aware"}
    assert not set(names) & set(shipped_configs())
    for name, file in names.items():
        run = read([name])
        validate(run, ("model.path", "data.path"))
        assert run.output == f"runs/{name}"
        header = file.read_text().split("\noutput:")[0]
        for word in ("Source:", "GPUs:", "Time:", f"train-reward {name}"):
            assert word in header, (name, word)
    assert read(["sd15_step_aware"]).optimizer.learning_rate == 3e-6
    assert (read(["sdxl_step_aware"]).reward.threshold, read(["sdxl_step_aware"]).training.steps) == (
        0.1,
        7000,
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "shipped recipes: sd15_step_aware"),
        (["tiny_rewards"], "did you mean tiny_reward?"),
        (["tiny_sdxl_dpo"], "no config file 'tiny_sdxl_dpo'"),
        (["--data.path", "tiny:pairs"], "model.path is not set"),
        (["tiny_reward", "--reward.guidence", "2"], "did you mean reward.guidance"),
        (["tiny_reward", "--reward.guidance", "-1"], "reward.guidance=-1.0; allowed: 0 or more"),
        (["tiny_reward", "--reward.low", "0.9", "--reward.high", "0.2"], "allowed: 0 <= low < high <= 1"),
        (["tiny_reward", "--reward.evaluated", "1.0"], "times from 0 to below 1"),
        (["tiny_reward", "--model.lora.rank", "4"], "model.lora.*has no effect on train-reward"),
        (["tiny_reward", "--training.reference_every", "4"], "training.reference_every=4 has no effect"),
        (["tiny_reward", "--method", "dpo"], "unknown key 'method'"),
        (["tiny_reward", "--reward.start", "/nowhere", "--data.limit", "8"], "there is no folder '/nowhere'"),
        (["tiny_reward", "--data.path", "tiny:likes", "--data.limit", "8"], "no two images of one prompt"),
        (
            ["tiny_reward", "--reward.decoder", "/nowhere", "--data.limit", "8"],
            "decoder '/nowhere' cannot be",
        ),
    ],
)
def test_bad_input_is_named(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = [*argv, "--output", str(tmp_path / "out")] if argv else argv
    assert main(["train-reward", *argv]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_an_earlier_run_is_not_written_over(done, capsys):
    run, _ = done
    with pytest.raises(UserError, match=r"step-2.*--resume latest"):
        train_reward(run, silent)
    other = replace(run, resume="latest", reward=replace(run.reward, guidance=2.0))
    with pytest.raises(UserError, match=r"reward.guidance is 1.0 in the checkpoint and 2.0 now"):
        train_reward(other, silent)


def test_a_record_goes_on_from_another_folder_with_a_moved_set(tmp_path, monkeypatch):
    """Started with a relative path and --overwrite; two epochs are counted as those of ``train``."""
    rows = pq.read_table(tiny.pairs_path())
    pq.write_table(rows.slice(0, 12), tmp_path / "p.parquet")
    pq.write_table(rows.slice(4, 12), tmp_path / "other.parquet")
    monkeypatch.chdir(tmp_path)
    flags = [
        "--data.path",
        "p.parquet",
        "--data.holdout",
        "0",
        "--overwrite",
        "true",
        "--training.steps",
        "1",
    ]
    lines = []
    train_reward(small("out", *flags), lines.append)
    assert "training: 1 step of 4 groups, 0.333 epochs of 12 groups" in lines
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    record = read([str(tmp_path / "out" / "config.yaml"), "--resume", "latest"])
    assert (record.overwrite, record.data.path) == (False, str(tmp_path / "p.parquet"))
    (tmp_path / "p.parquet").rename(tmp_path / "moved.parquet")
    moved = replace(record, data=replace(record.data, path=str(tmp_path / "moved.parquet")))
    other = replace(record, data=replace(record.data, path=str(tmp_path / "other.parquet")))
    with pytest.raises(UserError, match=r"the data of this run.*content differs.*another --output$"):
        train_reward(other, silent)
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another run writes"):
        train_reward(moved, silent)
    longer = replace(moved, training=replace(moved.training, epochs=0.5))
    assert train_reward(longer, lines.append).steps == 2
    assert "training: 2 steps of 4 groups, from step 1 on, 0.667 epochs of 12 groups" in lines


def test_a_moved_run_goes_on_where_its_record_lies(tmp_path, capsys):
    """As ``diffalign train`` does; --output has precedence."""
    (tmp_path / "moved" / "checkpoints").mkdir(parents=True)
    record = tmp_path / "moved" / "config.yaml"
    record.write_text(to_yaml(read(["tiny_reward", "--output", str(tmp_path / "made")])))
    assert read([str(record)]).output == str(tmp_path / "moved")
    assert read([str(record), "--output", "other"]).output == "other"
    assert main(["train-reward", str(record), "--print-config"]) == 0
    shown = capsys.readouterr()
    assert f"output: {tmp_path / 'moved'}\n" in shown.out
    assert shown.err == (
        f"note: the run goes on in {tmp_path / 'moved'}, where its config.yaml lies; it was made in "
        f"{tmp_path / 'made'}\n"
    )


def test_print_config_and_help(capsys):
    assert main(["train-reward", "tiny_reward", "--reward.guidance", "3", "--print-config"]) == 0
    assert "guidance: 3.0" in capsys.readouterr().out
    assert main(["train-reward", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--reward.decoder" in text and "--optimizer.learning_rate" in text
    assert not any(f"--{name}" in text for name in MEANINGLESS)


def test_other_trees_keep_their_own_names():
    """The flags of ``train`` are not those of ``train-reward``, and each names its own nearest."""
    from diffalign.config.io import apply_overrides

    with pytest.raises(UserError, match=r"unknown key 'reward.guidance'"):
        apply_overrides(Run(), ["--reward.guidance", "2"])
