"""Checks and messages at the start of a run: launcher, packages, length, scores, dropout."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from diffalign.cli.common import share
from diffalign.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)
from diffalign.data.encoding.geometry import cut_to
from diffalign.data.reading.examples import Counts, Example, ImageRef, Preferences
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.methods.dpo import DPO
from diffalign.methods.rankdpo import RankDPO
from diffalign.methods.smpo import SmPO
from diffalign.models.dropout import switch_off_dropout
from diffalign.runs import labels
from diffalign.runs.align import align
from diffalign.runs.labels import (
    check_rivals,
    look_at_votes,
    tell_of_cut_prompts,
    tell_of_cuts,
    tell_of_empty_prompts,
    tell_of_unread,
    tell_unliked,
)
from diffalign.runs.launcher import with_launcher
from diffalign.runs.schedule import MEASURED_STEPS, Forecast, announcement, duration, scheduled
from diffalign.runs.scores import RoundScores, check_online_scores, check_reward_range, check_scores
from diffalign.runs.validate import read_run
from diffalign.training import acceleration, packages
from diffalign.training.packages import check_packages
from diffalign.utils.devices import check_group
from diffalign.utils.distributed import joined
from tests.training.toys import PlaneDenoiser, Trial, network


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")


def test_the_launchers_settings_hold_where_the_runs_own_are_default(launched):
    lines = []
    run = with_launcher(Run(), lines.append)
    assert (run.training.mixed_precision, run.training.accumulation) == ("bf16", 4)
    assert [line.partition(" from ")[0] for line in lines] == [
        "training.mixed_precision=bf16",
        "training.accumulation=4",
    ]


def test_a_conflict_with_the_launcher_is_said_and_the_run_wins(launched):
    lines = []
    own = Run(training=TrainingConfig(mixed_precision="fp16", accumulation=4))
    assert with_launcher(own, lines.append) == own
    assert len(lines) == 1 and "launcher says mixed_precision bf16" in lines[0] and "fp16" in lines[0]


@pytest.mark.parametrize("value", ["no", "", None])
def test_a_launcher_that_says_nothing_changes_nothing(monkeypatch, value):
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    if value is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    run = Run(training=TrainingConfig(mixed_precision="bf16"))
    assert with_launcher(run, pytest.fail) == run and with_launcher(Run(), pytest.fail) == Run()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", r"says mixed_precision fp8 .*; allowed: no, bf16, fp16, or"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "='auto' from the launcher; allowed: a whole"),
        ("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER", "the compiler aot_eager .*; allowed: no, inductor"),
    ],
)
def test_what_a_run_does_not_have_of_the_launcher_is_refused(monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        with_launcher(Run(), lambda line: None)


def test_the_launchers_compiler_is_the_runs(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    lines = []
    run = with_launcher(Run(), lines.append)
    assert run.model.compile and lines == ["model.compile=True from the launcher (ACCELERATE_DYNAMO_BACKEND)"]
    assert with_launcher(run, pytest.fail) == run
    acceleration.accelerator_for(TrainingConfig())
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


def test_a_precision_of_the_run_holds_against_one_that_there_is_not(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    lines = []
    own = Run(training=TrainingConfig(mixed_precision="bf16"))
    assert with_launcher(own, lines.append) == own and "launcher says mixed_precision fp8" in lines[0]


def test_a_variable_that_accelerate_does_not_read_is_named(monkeypatch):
    monkeypatch.setattr(acceleration, "Accelerator", lambda **_: (_ for _ in ()).throw(ValueError("a\nb")))
    with pytest.raises(UserError, match="the launcher's settings cannot be used: a b; look at"):
        acceleration.accelerator_for(TrainingConfig())


@pytest.mark.parametrize(
    ("rank", "world"), [("1", None), ("", "2"), ("x", "2"), ("2", "2"), ("-1", "2"), ("0", "two")]
)
def test_ranks_that_are_none(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=f"RANK='{rank}'.*RANK below WORLD_SIZE"):
        share()


def test_left_over_ranks_without_a_launcher_are_no_run_of_one_process(monkeypatch):
    """accelerate would train as one process, silently: it looks at LOCAL_RANK alone."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    missing = r"RANK=0 and WORLD_SIZE=2 without LOCAL_RANK, MASTER_ADDR, MASTER_PORT.*unset RANK WORLD_SIZE"
    with pytest.raises(UserError, match=missing):
        align(Run())
    with pytest.raises(UserError, match=missing):
        acceleration.accelerator_for(TrainingConfig())
    with pytest.raises(UserError, match=missing), joined(2):
        pass
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="without MASTER_PORT, so this process cannot join the other 1"):
        check_group()


def test_processes_that_accelerate_does_not_join_are_an_error(monkeypatch):
    """As torchrun's on a machine without GPU, unless ACCELERATE_USE_CPU is set."""
    here = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    alone = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(acceleration, "Accelerator", lambda **_: alone)
    with pytest.raises(UserError, match=r"started 2 processes .*does not join on 'cpu'.*ACCELERATE_USE_CPU"):
        acceleration.accelerator_for(TrainingConfig())


def test_srun_of_many_tasks_without_a_launcher_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of the job: its batch script is one process
    assert share() == (0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert share() == (0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match=r"srun has started 8 tasks \(SLURM_STEP_NUM_TASKS\).*torchrun"):
        align(Run())
    monkeypatch.setenv("WORLD_SIZE", "1")  # the user's word that every task is a run of its own
    assert share() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RANK", "9")
    assert share() == (9, 16)


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_mpirun_of_many_processes_without_a_launcher_is_refused(monkeypatch, variable):
    """accelerate joins them on CPUs alone and numbers none by RANK: each would write the same folder."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "1")
    assert share() == (0, 1)
    monkeypatch.setenv(variable, "4")
    with pytest.raises(UserError, match=rf"mpirun has started 4 processes \({variable}\).*torchrun"):
        align(Run())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert share() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "16")  # accelerate launch on each of several nodes
    monkeypatch.setenv("RANK", "9")
    assert share() == (9, 16)


def test_missing_packages_are_found_at_the_start(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in ("wandb", "bitsandbytes") else 1)
    check_packages(("tensorboard", "trackio"), "adamw")
    with pytest.raises(UserError, match=r"logging.trackers=wandb needs wandb.*pip install wandb"):
        check_packages(("tensorboard", "wandb"), "adamw")
    with pytest.raises(UserError, match=r"optimizer.type=adamw8bit needs bitsandbytes"):
        check_packages((), "adamw8bit")


def test_epochs_become_steps():
    settings = TrainingConfig(epochs=3, batch_size=2, accumulation=4)
    assert scheduled(settings, 300, 2).steps == 57  # 900 groups, 16 a step
    assert scheduled(replace(settings, epochs=None), 300, 2).steps == 1000
    with pytest.raises(UserError, match=r"training.epochs=3 with rollout.prompts"):
        scheduled(settings, None, 1)
    whole = TrainingConfig(steps=2000, batch_size=16)
    assert announcement(whole, 300, 1) == "training: 2,000 steps of 16 groups, 107 epochs of 300 groups"
    assert announcement(whole, None, 1) == "training: 2,000 steps of 16 groups"
    assert announcement(whole, None, 1, 500).endswith("of 16 groups, from step 500 on")
    for done in (2000, 3000):
        words = f"nothing is left to train, the checkpoint is of step {done:,}"
        assert announcement(whole, 300, 1, done) == f"training: 2,000 steps of 16 groups: {words}"


def test_the_expected_time_is_told_once():
    lines, hook = [], None
    hook = Forecast(lines.append)
    state = SimpleNamespace(step=100, seconds=50.0, settings=SimpleNamespace(steps=4000))
    hook.on_start(state)
    for step in range(101, 121):
        state.step, state.seconds = step, state.seconds + (30.0 if step == 101 else 2.0)
        hook.on_step(state)
    left = 4000 - 100 - MEASURED_STEPS
    assert lines == [f"expected: 2.2 hours for all 4,000 steps, {duration(2.0 * left)} to go, at 2 s a step"]
    assert (duration(89), duration(300), duration(7200)) == ("89 seconds", "5 minutes", "2.0 hours")


def records(*rewards, scores=(1.0, 0.0)):
    made = [
        SimpleNamespace(images=(0, 1), rewards=r, scores=scores, where=f"row {i}")
        for i, r in enumerate(rewards)
    ]
    return made


def test_smpo_reads_rewards_in_the_scale_of_its_extremes():
    """PickScore's exp(scale) x cosine against the cosine's extremes makes every preference certain."""
    cosine = records(((0.21,), (0.19,)), ((0.25,), (0.2,)))
    check_scores(SmPO(), cosine, pytest.fail)
    scaled = records(((21.0,), (19.0,)), ((25.0,), (20.0,)))
    with pytest.raises(UserError, match=r"4 of 4 scores are outside of .*SmPO reads.*19 to 25.*row 0"):
        check_scores(SmPO(), scaled, pytest.fail)
    check_scores(SmPO(low=11.5, high=28.2), scaled, pytest.fail)
    with pytest.raises(UserError, match=r"data.rewards"):
        check_scores(SmPO(), records((), ()), pytest.fail)  # labels of 1 and 0
    lines = []
    check_scores(SmPO(), [*cosine * 50, *records(((0.9,), (0.2,)))], lines.append)
    assert len(lines) == 1 and lines[0].startswith("warning: 1 of 202 scores")


def test_smpos_range_is_checked_by_the_cards_before_anything_is_scored():
    check_reward_range(SmPO(), DataConfig(rewards=("pickscore:scale=1",)))
    check_reward_range(RankDPO(), DataConfig(rewards=("pickscore",)))  # reads no rewards
    with pytest.raises(UserError, match=r"scores of pickscore are usually 17 to 24.*-0.05115 to 0.4486"):
        check_reward_range(SmPO(), DataConfig(rewards=("pickscore",)))


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"rewards": ("pickscore:scale=1",)}, None),
        ({"rewards": ("0.5*pickscore:scale=1", "0.5*hpsv2")}, None),
        ({"rewards": ("latent_reward:sd15",)}, None),  # whose range no card tells
        ({"rewards": ("pickscore",), "normalise": "round"}, None),  # of a range that the first round shows
        ({"rewards": ("pickscore",)}, "usually 17 to 24"),
        ({"rewards": ("-0.5*pickscore:scale=1", "mps")}, "usually 4.88 to 15.91"),
        ({"rewards": ("pickscore",), "combine": "wins"}, "combine='wins' give scores of 0 to 1"),
        ({"by": "people"}, "by='people'.*give scores of 0 to 1"),
    ],
)
def test_smpos_range_is_checked_online(rollout, message):
    config = RolloutConfig(prompts="tiny:train", **rollout)
    if message is None:
        check_online_scores(SmPO(), config)
        return
    with pytest.raises(UserError, match=message):
        check_online_scores(SmPO(), config)
    if "0 to 1" in message:
        check_online_scores(SmPO(low=0.0, high=1.0), config)


def test_the_first_round_out_of_range_ends_the_run_and_a_later_one_warns():
    inside, outside = torch.tensor([[0.2, 0.24]]), torch.tensor([[0.2, 24.0]])
    with pytest.raises(UserError, match=r"1 of 2 scores of a round.*0.2 to 24.*pickscore:scale=1"):
        RoundScores(SmPO(), pytest.fail)(outside)
    lines = []
    check = RoundScores(SmPO(), lines.append)
    for scores in (inside, outside, outside):
        check(scores)
    assert len(lines) == 1 and lines[0].startswith("warning: 1 of 2 scores of a round")
    RoundScores(DPO(), pytest.fail)(outside)  # reads an order only


def test_rankdpos_gains_are_shares():
    check_scores(RankDPO(), records(((9.0,), (8.0,)), scores=(1.0, 0.25)), pytest.fail)
    with pytest.raises(UserError, match=r"2 of 2 scores are outside of 0 to 1.*data.rewards_as wins"):
        check_scores(RankDPO(), records((), scores=(21.5, 19.0)), pytest.fail)
    check_online_scores(RankDPO(), RolloutConfig(combine="wins"))
    with pytest.raises(UserError, match=r"rollout.combine='sum' with RankDPO"):
        check_online_scores(RankDPO(), RolloutConfig(combine="sum"))


def test_dropout_is_off_and_the_loss_starts_at_log_2():
    """In training mode policy and reference are one function at random weights; with dropout they differ."""
    first = []
    for off in (True, False):
        trial = Trial(settings=TrainingConfig(steps=1, batch_size=8), dropout=0.5)
        for one in (trial.network, trial.reference):
            assert (switch_off_dropout(one) if off else 1) == 1
        trial.reference.load_state_dict(trial.network.state_dict())
        trial.reference.train()
        state = trial.run()
        first.append(state.loss)
    assert first[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-7)
    assert abs(first[1] - first[0]) > 1e-3


def test_loras_own_dropout_stays():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), nn.Dropout2d(0.2), nn.Dropout(0.0))
    assert switch_off_dropout(net) == 2 and all(m.p == 0 for m in net[1:])
    net.append(nn.Dropout(0.1))  # as LoRA's, which is added after
    assert net[-1].p == 0.1


def test_single_images_that_are_not_liked_teach_sft_nothing():
    """SFT and DRO learn from what KTO calls liked, and from winners of groups whatever their scores."""
    from diffalign.methods.sft import winners
    from diffalign.strategies._common import best
    from diffalign.types import Batch

    score = torch.tensor([1.0, 0.0, 0.5, 0.2, 0.1, -3.0, -4.0])
    group = torch.tensor([0, 1, 2, 3, 3, 4, 4])
    index, good = winners(score, group)
    assert index.tolist() == [0, 1, 2, 3, 5] and good.tolist() == [True, False, False, True, True]
    same_index, same = best(Batch(torch.zeros(7, 1), {}, group, score))
    assert same_index.tolist() == index.tolist() and same.tolist() == good.tolist()


def test_dislikes_give_sft_no_gradient():
    from diffalign.methods.sft import SFT
    from diffalign.types import Batch

    model = PlaneDenoiser(network())
    cond = {"c": torch.zeros(4, 1, dtype=torch.float64)}
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = SFT()(
        model, model, Batch(x, cond, torch.arange(4), torch.zeros(4)), torch.Generator().manual_seed(1)
    )
    assert float(step.weight) == 0 and float(step.loss.detach()) == 0


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_a_launchers_plugin_that_runs_do_not_have_is_a_user_error(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=rf"{variable}.*allowed.*training.shard full"):
        acceleration.accelerator_for(TrainingConfig())


@pytest.mark.parametrize(("method", "told"), [("sft", ["12 disliked ones"]), ("kto", [])])
def test_dislikes_that_teach_nothing_are_told(method, told):
    lines = []
    tell_unliked(method, Counts(liked=3, disliked=12), lines.append)
    assert len(lines) == len(told) and all(word in line for word, line in zip(told, lines, strict=True))


def encoded_of(sizes, kinds=None, rewards=False):
    """Return what ``check_rivals`` reads of a set."""
    kinds = np.array(kinds or ["pair" if size == 2 else "liked" for size in sizes])
    records = SimpleNamespace(sizes=np.array(sizes), kinds=kinds)
    return SimpleNamespace(records=records, extras={"reward"} if rewards else set())


@pytest.mark.parametrize(
    ("method", "sizes", "told"),
    [
        ("dpo", [2, 1, 1], ["warning: 2 of 3 groups are single images, from which dpo learns nothing"]),
        ("dpo", [2, 2], []),
        ("kto", [1, 1], []),
        ("sft", [1, 2], []),
        ("rankdpo", [2, 1], ["warning: 1 of 2 groups are single images, from which rankdpo learns nothing"]),
        (
            "madpo",
            [2],
            [
                "warning: the set has no rewards, and madpo weights pairs by their margins: labels of 1 and "
                "0 weight all alike; data.rewards gives some"
            ],
        ),
    ],
)  # fmt: skip
def test_groups_that_teach_nothing_are_told(method, sizes, told):
    lines = []
    check_rivals(Run(method={"type": method}), encoded_of(sizes), lines.append)
    assert lines == told


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "dpo",
            r"'dpo' compares images of one prompt, and the set has 2 single images.*: kto, sft, or a",
        ),
        ("diffusion_lpo", "'diffusion_lpo' compares images of one prompt"),
        ("tdpo", r"'tdpo' compares captions of one image, and no group.*data\.view captions"),
    ],
)
def test_a_set_without_what_the_method_compares_is_refused(method, words):
    with pytest.raises(UserError, match=words):
        check_rivals(Run(method={"type": method}), encoded_of([1, 1]), print)
    mixed = Run(method={"type": method}, strategies=({"type": "sft"},))  # which learns from single images
    check_rivals(mixed, encoded_of([1, 1]), lambda line: None)


def test_rewards_and_captions_that_are_there():
    lines = []
    check_rivals(Run(method={"type": "madpo"}), encoded_of([2], rewards=True), lines.append)
    check_rivals(Run(method={"type": "tdpo"}), encoded_of([2], ["caption"]), lines.append)
    assert lines == []


def test_empty_prompts_are_counted():
    lines = []
    for prompts in (["a", " ", "", "b"], ["a"]):
        tell_of_empty_prompts(pa.chunked_array([pa.array(prompts, pa.large_string())]), lines.append)
    assert lines == ["warning: 2 of 4 prompts are empty"]


def test_prompts_that_lose_their_ends_are_counted():
    lines = []
    for n in (0, 3):
        tell_of_cut_prompts(SimpleNamespace(truncated_prompts=n), lines.append)
    assert len(lines) == 1 and lines[0].endswith("lose their ends: 3")


def test_a_run_and_its_validation_tell_of_prompt_weights(tmp_path, capsys):
    (tmp_path / "w").mkdir()
    (tmp_path / "l").mkdir()
    for number in range(2):
        for side in "wl":
            Image.new("RGB", (32, 32), (90 * number, 9 if side == "w" else 99, 0)).save(
                tmp_path / side / f"{number}.png"
            )
        (tmp_path / "w" / f"{number}.txt").write_text(["a (red:1.3) cat", "a (small) dog"][number])
    run = Run(
        output=str(tmp_path / "o"),
        model=ModelConfig(path="tiny:sd15", lora=LoraConfig(rank=1)),
        data=DataConfig(path=str(tmp_path), resolution=32, holdout=0),
        training=TrainingConfig(steps=1, batch_size=1),
        validation=ValidationConfig(
            every=5, prompts=("<lora:x:1> a",), sampling_steps=1, images_per_prompt=1
        ),
    )
    align(run)
    told = capsys.readouterr().err
    assert told.count("note: 1 of 2 prompts have weights or tags of A1111 or ComfyUI") == 1
    assert told.count("note: of the validation, 1 of 1 prompts have weights or tags") == 1


def cuts_of(*sizes, target=(32, 32)):
    images = [[asdict(cut_to(size, target)) for size in sizes], []]
    kind = pa.list_(pa.struct({name: pa.list_(pa.int32()) for name in ("original", "resized", "target")}))
    lines = []
    tell_of_cuts(pa.chunked_array([pa.array(images, kind)]), lines.append)
    return lines


def test_prompts_that_lose_their_ends_are_those_of_all_processes(monkeypatch):
    monkeypatch.setattr(labels, "gathered", lambda value: [value, 3])
    lines = []
    tell_of_cut_prompts(SimpleNamespace(truncated_prompts=0), lines.append)
    assert lines[0].endswith("lose their ends: 3")


def test_images_that_are_enlarged_or_mostly_cropped_are_counted():
    (line,) = cuts_of((32, 32), (16, 20), (28, 28), (64, 64))
    assert "warning: 1 of 4 images are smaller" in line and "the smallest (20 x 16) 2.0 times" in line
    (line,) = cuts_of((64, 160), (64, 64), (48, 32))
    assert "1 of 3 images lose more than half of their area to the crop" in line
    assert cuts_of((64, 64)) == cuts_of() == []


def test_a_run_tells_of_enlarged_images(tmp_path, capsys):
    data = DataConfig(path="tiny:pairs", resolution=64, limit=2, holdout=0)
    model = ModelConfig(path="tiny:sd15", lora=LoraConfig(rank=1))
    align(Run(output=str(tmp_path), model=model, data=data, training=TrainingConfig(steps=1)))
    assert "warning: 4 of 4 images are smaller than the training size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"votes": "weight"}, "no effect of data.votes='weight': the set has no votes"),
        (
            {"votes": "majority", "min_agreement": 0.9},
            "data.votes='majority' and data.min_agreement=0.9: the",
        ),
        (
            {"min_agreement": 0.9},
            "no effect of data.min_agreement=0.9: the set has no votes (none of the fir",
        ),
        ({}, None),
    ],
)
@pytest.mark.parametrize("votes", [(), (0.7, 0.3)])
def test_settings_of_votes_without_votes_are_told(settings, told, votes):
    row = Example("a", (ImageRef(b"1"), ImageRef(b"2")), (1.0, 0.0), "p row 0", votes=votes)
    lines, rows = [], Preferences("p", lambda: iter([row] * 3), 3, None)
    look_at_votes(Run(data=DataConfig(**settings)), rows, lines.append)
    assert [told in line for line in lines] == ([True] if told and not votes else [])


@pytest.mark.parametrize(
    ("method", "strategies", "extras", "told"),
    [
        ({"type": "dpo"}, (), {"weight"}, ["weights"]),
        ({"type": "dpo"}, ({"type": "weighted"},), {"weight"}, []),
        ({"type": "dpo"}, (), {"reward", "patches"}, ["maps", "rewards"]),
        ({"type": "madpo"}, ({"type": "masked"},), {"reward", "patches"}, []),
        ({"type": "semi_dpo"}, (), {"time_labels"}, []),
    ],
)
def test_data_that_neither_method_nor_strategy_reads_is_told(method, strategies, extras, told):
    run, lines = Run(method=method, strategies=strategies), []
    tell_of_unread(run, build(method), SimpleNamespace(extras=extras), lines.append)
    assert [line.split()[4].strip(",") for line in lines] == told


def test_a_run_tells_of_votes_that_are_not_there(tmp_path, capsys):
    data = DataConfig(path="tiny:pairs", resolution=32, limit=2, holdout=0, votes="weight")
    model = ModelConfig(path="tiny:sd15", lora=LoraConfig(rank=1))
    align(Run(output=str(tmp_path), model=model, data=data, training=TrainingConfig(steps=1)))
    assert capsys.readouterr().err.count("warning: no effect of data.votes='weight'") == 1


@pytest.mark.parametrize("run", ["tiny_sdxl_dpo", {"model": {"path": "tiny:sdxl"}}])
def test_what_is_no_run_is_told_how_one_is_made(run):
    with pytest.raises(
        TypeError, match=rf"run is a {type(run).__name__}; allowed: a Run, such as read_run\("
    ):
        align(run)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"model": {"pth": "tiny:sdxl"}}, r"unknown key 'model\.pth' in the Run; did you mean model\.path"),
        ({"model": "tiny:sdxl"}, "model='tiny:sdxl'; allowed: a mapping with keys of ModelConfig"),
        (
            {"training": TrainingConfig(steps="many")},
            r"training\.steps='many' \(str\); allowed: a whole number",
        ),
        ({"method": "dop"}, "unknown method .*'dop'; did you mean dpo"),
        ({"data": {"path": Path("gone")}, "model": {"path": "tiny:sd15"}}, "'gone': no such file or folder"),
    ],
)
def test_a_run_of_python_values_is_checked_as_one_of_yaml(tmp_path, parts, words):
    with pytest.raises(UserError, match=words):
        align(Run(output=tmp_path / "run", **parts), lambda line: None)


def test_targets_that_are_not_there_are_found_before_anything_is_encoded(tmp_path):
    flags = ["--model.lora.targets=to_q,to_x", f"--data.cache_dir={tmp_path / 'cache'}", "--data.limit=8"]
    with pytest.raises(UserError, match="targets: to_x matches no linear"):
        align(read_run("tiny_sdxl_dpo", [*flags, f"--output={tmp_path / 'run'}"]), lambda line: None)
    assert not (tmp_path / "cache").exists()
