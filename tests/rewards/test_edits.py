"""Source images beside edited ones: from tables, caches, addresses and rollouts to the reward."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from diffalign import rewards
from diffalign.cli import main
from diffalign.config.io import apply_overrides
from diffalign.errors import UserError
from diffalign.evaluation.measuring.store import Chunk, NamedReward
from diffalign.media.sourced import SourcedPrompt
from diffalign.rewards.ensemble import judges_edits
from diffalign.rewards.prompt_checks import ChecksPrompts
from diffalign.rewards.registry import parse
from diffalign.rewards.scoring.cache import ScoreCache
from diffalign.rewards.scoring.items import read_items
from diffalign.rewards.scoring.score import Scorer, score
from diffalign.rewards.serving.remote import RemoteReward
from diffalign.rewards.serving.server import RewardServer, Served
from diffalign.rewards.specs import Weighted
from diffalign.rewards.zoo.edits import edits_of
from diffalign.rollout.judges import InlineJudge
from diffalign.runs.online_checks import check_online
from diffalign.runs.validate import read_run
from tests.rewards.conftest import write_jsonl
from tests.rewards.test_server import answering, running


def plain(level):
    return Image.new("RGB", (8, 6), (level,) * 3)


def encoded(level):
    buffer = io.BytesIO()
    plain(level).save(buffer, "PNG")
    return buffer.getvalue()


class Change:
    """How much lighter an edit is than its source."""

    def __call__(self, images, prompts):
        sources = [prompt.image for prompt in edits_of("change", prompts)]
        return torch.tensor(
            [float(np.mean(i)) - float(np.mean(s)) for i, s in zip(images, sources, strict=True)]
        )


def scores_of(items, cache=None):
    return score(items, [Scorer("change", Change(), "key")], cache, progress=False).rows


def test_a_table_of_edits(tmp_path):
    for level in (10, 40, 60):
        plain(level).save(tmp_path / f"{level}.png")
    rows = [
        {"prompt": "a", "source": "10.png", "chosen": "60.png", "rejected": "40.png"},
        {"prompt": "a", "source": "40.png", "chosen": "60.png", "rejected": "10.png"},
    ]
    table = write_jsonl(tmp_path / "edits.jsonl", rows)
    found = scores_of(read_items(table, edits=True))
    assert [(row["change_chosen"], row["change_rejected"]) for row in found] == [(50, 30), (20, -30)]
    assert [row["prompt"] for row in found] == ["a", "a"] and json.dumps(found)


def test_a_parquet_file_of_edits(tmp_path):
    cells = {"caption": ["a", "b"], "input_image": [encoded(5), encoded(7)], "image": [encoded(9)] * 2}
    parquet.write_table(pyarrow.table(cells), tmp_path / "edits.parquet")
    assert [row["change"] for row in scores_of(read_items(tmp_path / "edits.parquet", edits=True))] == [4, 2]
    pairs = {"caption": ["a"], "image": [encoded(5)], "jpg_0": [encoded(6)], "jpg_1": [encoded(8)]}
    parquet.write_table(pyarrow.table(pairs), tmp_path / "pairs.parquet")
    (row,) = scores_of(read_items(tmp_path / "pairs.parquet", edits=True))
    assert (row["change_0"], row["change_1"]) == (1, 3)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, "none"),
        ({"source_image": "a.png", "input_image": "b.png"}, "source_image, input_image"),
        ({"source": "the web"}, "none"),
        ({"source_image": None}, "source_image"),
    ],
)
def test_rows_without_the_one_source(tmp_path, fields, found):
    table = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "image": "e.png", **fields}])
    with pytest.raises(UserError, match=rf"x.jsonl line 1: a reward of edits needs .*may be it: {found};"):
        list(read_items(table, edits=True))
    assert type(next(read_items(table)).prompt) is str  # other rewards read it as before


def test_a_source_is_part_of_what_is_cached(tmp_path):
    cache = ScoreCache(tmp_path / "cache.sqlite")
    first, second = SourcedPrompt("a", encoded(1)), SourcedPrompt("a", encoded(2))
    keys = {cache.key("image", prompt, "reward") for prompt in ("a", first, second)}
    assert len(keys) == 3 and cache.key("image", SourcedPrompt("a", encoded(1)), "reward") in keys
    plain(9).save(tmp_path / "e.png")
    for level in (1, 2):
        plain(level).save(tmp_path / f"{level}.png")
    rows = [{"prompt": "a", "source": f"{level}.png", "image": "e.png"} for level in (1, 2, 1)]
    table = write_jsonl(tmp_path / "edits.jsonl", rows)
    for _ in range(2):
        assert [row["change"] for row in scores_of(read_items(table, edits=True), cache)] == [8, 7, 8]


def test_evaluation_measures_edits_of_two_sources_apart(tmp_path):
    plain(9).save(tmp_path / "e.png")
    prompts = (SourcedPrompt("a", encoded(1)), SourcedPrompt("a", encoded(2)))
    first, second = Chunk((tmp_path / "e.png",) * 2, prompts, False).keys(NamedReward("x", "x", Change))
    assert first != second


def test_sources_travel_to_an_address():
    card = replace(parse("edit_reward")[0], name="change")
    with running(RewardServer({"change": Served(card, Change())}, port=0)) as where:
        prompts = [SourcedPrompt("a", encoded(10)), SourcedPrompt("b", encoded(20))]
        assert RemoteReward(f"{where}/change")([plain(30), plain(50)], prompts).tolist() == [20, 30]
        with pytest.raises(UserError, match="judges edits, and the prompt 'a' has no source image"):
            RemoteReward(f"{where}/change", retries=0)([plain(30)], ["a"])


def test_requests_name_sources_where_there_are_some():
    answer = (200, b'{"scores": [1.0]}')
    with answering(answer) as (where, asked):
        RemoteReward(where)([plain(1)], ["a"])
        RemoteReward(where)([plain(1)], [SourcedPrompt("a", encoded(2))])
    assert "sources" not in asked[0] and len(asked[1]["sources"]) == 1


@pytest.mark.parametrize("sources", [[], ["x"], 3, [4]])
def test_sources_that_are_none(sources):
    import urllib.error
    import urllib.request

    with running(RewardServer({"judge": Served(parse("judge")[0], rewards.load("judge"))}, port=0)) as where:
        body = {"images": [rewards.serving.remote._encoded(plain(1))], "prompts": ["a"], "sources": sources}
        request = urllib.request.Request(f"{where}/judge", json.dumps(body).encode(), method="POST")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400 and "source" in json.loads(caught.value.read())["error"]


def test_a_rollouts_judge_hands_sources_on():
    judge = InlineJudge((Weighted("change", "change"),), [Change()])
    prompts = [SourcedPrompt("a", encoded(51)), SourcedPrompt("a", encoded(102))]
    pixels = torch.full((2, 3, 6, 8), 0.8)
    found = judge.submit(pixels, prompts, torch.zeros(2)).result()
    assert found.tolist() == [[153], [102]]


def test_runs_and_evaluations_ask_for_sources_before_they_sample(tmp_path):
    plain(9).save(tmp_path / "s.png")
    edits = write_jsonl(tmp_path / "edits.jsonl", [{"prompt": "a", "source": "s.png"}])
    plans = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "a"}])
    run = read_run("tiny_sd3_flow_grpo", ["--rollout.rewards=0.5*edit_reward"])
    (prompt,) = check_online(apply_overrides(run, [f"--rollout.prompts={edits}"]))
    assert isinstance(prompt, SourcedPrompt)
    with pytest.raises(UserError, match="'edit_reward' judges edits, and the prompt 'a' has no source image"):
        check_online(apply_overrides(run, [f"--rollout.prompts={plans}"]))
    reward = rewards.load("unified_reward_edit:http://127.0.0.1:9/v1@m")
    assert isinstance(reward, ChecksPrompts)
    reward.check_prompts([prompt])
    with pytest.raises(UserError, match="has no source image"):
        reward.check_prompts(["a"])


def test_who_judges_edits(tmp_path):
    assert judges_edits("edit_reward:/x@/y") and not judges_edits("pickscore")
    file = tmp_path / "both.yaml"
    file.write_text(json.dumps({"members": [{"reward": "jpeg"}, {"reward": "unified_reward_edit"}]}))
    assert judges_edits(f"ensemble:{file}")


def test_the_command_scores_edits(tmp_path, monkeypatch, capsys):
    for level in (10, 60):
        plain(level).save(tmp_path / f"{level}.png")
    write_jsonl(tmp_path / "edits.jsonl", [{"prompt": "a", "source": "10.png", "image": "60.png"}])
    monkeypatch.setattr("diffalign.rewards.zoo.edit_reward.load", lambda source, place: Change())
    assert main(["score", str(tmp_path / "edits.jsonl"), "--rewards", "edit_reward", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"reward": "edit_reward", "images": 1, "mean": 50}]
    (tmp_path / "60.txt").write_text("a")
    (tmp_path / "10.txt").write_text("b")
    assert main(["score", str(tmp_path), "--rewards", "edit_reward"]) == 2
    assert "has no source image" in capsys.readouterr().err
