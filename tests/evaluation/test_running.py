"""A complete evaluation: several models, interruption and resumption, one or two processes."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from diffalign.data.prompts.prompt_sets import PromptSet
from diffalign.errors import UserError
from diffalign.evaluation import running
from diffalign.evaluation.contest import contest
from diffalign.evaluation.drawing.samples import read_samples
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.measuring import store as kept
from diffalign.evaluation.measuring.statistics import compare, holm
from diffalign.evaluation.measuring.store import MeasurementStore, NamedReward, chunks
from diffalign.evaluation.report.report import RunFacts, contest_data, write_contest
from diffalign.evaluation.running import Entrant, entrant_names, evaluate_models
from tests.evaluation.fakes import FilmingPipeline, PaintingPipeline, brightness
from tests.helpers import in_two_processes

N = 10
PROMPTS = PromptSet(
    tuple(f"prompt {i}" for i in range(N)), {"kind": tuple("ab"[i % 2] if i < 8 else "" for i in range(N))}
)
LIFTS = {"base": 0, "mild": 5, "bold": 20}


class Stopped(Exception):
    pass


@dataclass
class Bench:
    """Three painters and two rewards that count their work, and stop in the middle of it when told to."""

    pipelines: dict = field(
        default_factory=lambda: {
            name: PaintingPipeline(lift=lift, network=torch.nn.Linear(2, 2)) for name, lift in LIFTS.items()
        }
    )
    scored: list = field(default_factory=list)
    opened: list = field(default_factory=list)
    patience: int = 10**6

    def work(self):
        self.patience -= 1
        if self.patience < 0:
            raise Stopped

    def open(self, name):
        def opened():
            self.opened.append(name)
            return Counting(self.pipelines[name], self)

        return opened

    def asked(self, name, sign):
        def reward(images, prompts):
            self.work()
            self.scored += [(name, np.asarray(image).tobytes()) for image in images]
            return sign * brightness(images, prompts)

        return NamedReward(name, name, lambda: reward)

    def evaluate(self, folder, **options):
        return evaluate_models(
            self.open("base"),
            [Entrant(name, name, self.open(name)) for name in ("mild", "bold")],
            PROMPTS,
            [self.asked("light", 1), self.asked("dark", -1)],
            output=folder,
            images_per_prompt=2,
            batch_size=4,
            progress=False,
            **options,
        )

    @property
    def drawn(self):
        return [p for pipeline in self.pipelines.values() for call in pipeline.calls for p in call["prompt"]]


@dataclass
class Counting:
    """A pipeline that counts its calls as work."""

    pipeline: PaintingPipeline
    bench: Bench

    @property
    def components(self):
        return self.pipeline.components

    def set_progress_bar_config(self, **options):
        self.pipeline.set_progress_bar_config(**options)

    def __call__(self, prompt, generator, output_type):
        self.bench.work()
        return self.pipeline(prompt, generator, output_type)


def facts(found):
    return {name: RunFacts("dpo", versions={}) for name in found.names}


def test_what_is_found_is_what_evaluate_finds_of_each(tmp_path):
    bench = Bench()
    found = bench.evaluate(tmp_path)
    assert bench.opened == ["base", "mild", "bold"] and found.names == ("mild", "bold")
    for name in found.names:
        expected = evaluate(
            found.base,
            found.aligned[name],
            found.evaluations[name].prompts,
            {"light": brightness, "dark": lambda i, p: -brightness(i, p)},
            progress=False,
        )
        assert found.evaluations[name] == expected
        assert found.evaluations[name].primary.comparison.gain.value == pytest.approx(LIFTS[name], abs=1e-4)


def test_stopped_anywhere_and_given_again_it_is_the_same_and_nothing_is_done_twice(tmp_path, monkeypatch):
    for module in (running, kept):  # there is no memory to speak of, and asking for it back takes a while
        monkeypatch.setattr(module, "freed", lambda: None)
    whole = Bench()
    expected = whole.evaluate(tmp_path / "whole")
    work = 10**6 - whole.patience
    # 3 models x 20 images in batches of 4, and 3 chunks of 20 images by 2 rewards
    assert work == 15 + 6 and len(whole.drawn) == 60 and len(set(whole.scored)) == len(whole.scored) == 120
    for stop in (0, 3, 5, 9, 14, 15, 16, 18, 20):
        bench = Bench(whole.pipelines, patience=stop)
        for pipeline in bench.pipelines.values():
            pipeline.calls.clear()
        with pytest.raises(Stopped):
            bench.evaluate(tmp_path / str(stop))
        bench.patience = 10**6
        found = bench.evaluate(tmp_path / str(stop))
        assert json.dumps(contest_data(found, facts(found))) == json.dumps(
            contest_data(expected, facts(expected))
        )
        assert len(bench.drawn) == 60 and len(set(bench.scored)) == len(bench.scored) == 120
        bench.evaluate(tmp_path / str(stop))  # and once more: there is nothing left to do
        assert len(bench.drawn) == 60 and len(bench.scored) == 120


def test_prompts_that_a_reward_cannot_score_are_told_before_a_model_is_opened(tmp_path):
    @dataclass
    class Picky:
        asked: list

        def check_prompts(self, prompts):
            self.asked += prompts
            raise UserError("cannot score these")

        def __call__(self, images, prompts):
            raise AssertionError("no image")

    bench, asked = Bench(), []
    with pytest.raises(UserError, match="cannot score these"):
        evaluate_models(
            bench.open("base"),
            [Entrant("mild", "mild", bench.open("mild"))],
            PROMPTS,
            [NamedReward("picky", "key", lambda: Picky(asked))],
            output=tmp_path,
            progress=False,
        )
    assert bench.opened == [] and tuple(asked) == PROMPTS.prompts


def test_two_processes_write_the_report_of_one(tmp_path):
    in_two_processes("tests.evaluation.evaluating", tmp_path / "two", pipelines=True)
    from tests.evaluation import evaluating

    evaluating.main(str(tmp_path / "one"))
    two, one = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("two", "one"))
    assert two == one and two["models"].keys() == {"mild", "bold"}
    drawn = [json.loads((tmp_path / "two" / f"work-{rank}.json").read_text()) for rank in (0, 1)]
    assert [w["images"] for w in drawn] == [3 * N, 3 * N]  # 20 images of 3 models, half each
    assert drawn[0]["scores"] + drawn[1]["scores"] == 120 and min(w["scores"] for w in drawn) > 0
    assert len(read_samples(tmp_path / "two" / "images" / "bold")) == 2 * N


def test_the_table_has_a_row_a_model_and_prompt(tmp_path):
    found = Bench().evaluate(tmp_path)
    write_contest(tmp_path, found, facts(found), "mild, bold against base")
    table = parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert list(table[0]) == ["model", "prompt", "category_kind", "images", "score_light", "score_dark"]
    assert [row["model"] for row in table] == ["base"] * N + ["mild"] * N + ["bold"] * N
    assert [row["category_kind"] for row in table[:N]] == list(PROMPTS.categories["kind"])
    assert all(row["images"] == 2 and row["score_dark"] == -row["score_light"] for row in table)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        assert line["base"]["light"] == table[i]["score_light"]
        assert line["models"]["bold"]["light"] == table[2 * N + i]["score_light"]
        assert line["categories"] == {"kind": PROMPTS.categories["kind"][i]}


def test_report_json_of_several_models(tmp_path):
    found = Bench().evaluate(tmp_path)
    data = contest_data(found, facts(found))
    assert data["best"] == "bold" and data["verdict"] == "better"
    assert data["headline"] == "bold is the best of 2, and better than the base."
    assert data["gain"] == data["models"]["bold"]["gain"] == pytest.approx(20, abs=1e-4)
    assert data["lead"]["over"] == "mild" and data["lead"]["gain"] == pytest.approx(15, abs=1e-4)
    kinds = data["models"]["mild"]["categories"]["kind"]
    assert {kind: value["prompts"] for kind, value in kinds.items()} == {"a": 4, "b": 4}
    assert kinds["a"]["rewards"]["light"]["gain"] == pytest.approx(5, abs=1e-4)
    assert "dark fell" in " ".join(data["models"]["bold"]["alarm"])


def test_corrections_are_over_models_and_then_over_the_other_rewards_too():
    random = np.random.default_rng(0)
    prompts = [f"p{i}" for i in range(30)]
    scores = {
        (model, reward): random.normal(shift, 1.0, 30)
        for model, shift in (("base", 0.0), ("one", 0.3), ("two", 0.6))
        for reward in ("first", "second", "third")
    }
    evaluations = {}
    from diffalign.evaluation.evaluate import judged
    from diffalign.evaluation.measuring.measuring import Measured

    def measured(model):
        values = {r: list(scores[model, r]) for r in ("first", "second", "third")}
        return Measured(values, {}, [np.zeros((2, 2, 3))] * 30)

    for model in ("one", "two"):
        evaluations[model] = judged(measured("base"), measured(model), prompts, "image")
    found = contest([], {"one": [], "two": []}, evaluations)
    p = {
        key: compare(scores["base", key[1]], scores[key], prompts).p_value
        for key in scores
        if key[0] != "base"
    }
    assert [found.adjusted[m]["first"] for m in ("one", "two")] == holm(
        [p["one", "first"], p["two", "first"]]
    )
    others = [(m, r) for m in ("one", "two") for r in ("second", "third")]
    assert [found.adjusted[m][r] for m, r in others] == holm([p[key] for key in others])
    assert found.best == max(("one", "two"), key=lambda m: scores[m, "first"].mean())


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.4]) == pytest.approx([0.8, 0.8]) and holm([0.2]) == [0.2] and holm([]) == []
    random = np.random.default_rng(0)  # no difference in any of five tests: a false alarm in at most 5 %
    alarms = np.mean([min(holm(random.uniform(size=5).tolist())) < 0.05 for _ in range(4000)])
    assert 0.04 < alarms < 0.06


def test_names_of_models():
    assert entrant_names(["runs/dpo/aligned", "runs/sft"]) == ["dpo", "sft"]
    assert entrant_names(["a/dpo/aligned", "b/dpo"]) == ["a/dpo", "b/dpo"]
    assert entrant_names(["stabilityai/sdxl"]) == ["sdxl"] and entrant_names(["aligned"]) == ["aligned"]
    assert entrant_names(["runs/base"]) == ["runs/base"]  # `base` is the base's
    assert entrant_names(["."]) == [Path.cwd().name]
    assert entrant_names(["x/", "x"]) == ["x", "x (2)"] and entrant_names(["base"]) == ["base (2)"]


def test_a_score_that_is_no_number_is_named_and_nothing_is_lost(tmp_path):
    bench = Bench()
    broken = NamedReward(
        "broken", "broken", lambda: lambda images, prompts: torch.full((len(images),), torch.nan)
    )
    base, entrants = bench.open("base"), [Entrant("bold", "bold", bench.open("bold"))]
    with pytest.raises(UserError, match="'broken' gives nan for an image of 'prompt 0'"):
        evaluate_models(
            base, entrants, PROMPTS, [bench.asked("light", 1), broken], output=tmp_path, progress=False
        )
    assert len(bench.drawn) == 2 * N and len(bench.scored) == 2 * N
    evaluate_models(base, entrants, PROMPTS, [bench.asked("light", 1)], output=tmp_path, progress=False)
    assert len(bench.drawn) == 2 * N and len(bench.scored) == 2 * N


def test_a_reward_that_cannot_be_loaded_says_so_before_anything_is_drawn(tmp_path):
    def missing():
        raise UserError("no such checkpoint")

    bench = Bench()
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate_models(
            bench.open("base"), [Entrant("bold", "bold", bench.open("bold"))], PROMPTS,
            [NamedReward("lost", "lost", missing)], output=tmp_path, progress=False,
        )  # fmt: skip
    assert bench.opened == []


def test_what_is_kept_of_videos(tmp_path):
    from tqdm import tqdm

    from diffalign.evaluation.drawing.sampling import generate
    from diffalign.evaluation.measuring.measuring import measure

    samples = generate(FilmingPipeline(), ["a", "b"], folder=tmp_path / "videos", progress=False)
    files = [sample.source for sample in samples]
    store, asked = (
        MeasurementStore(tmp_path / "m.sqlite"),
        [NamedReward("light", "light", lambda: brightness)],
    )
    some = chunks(files, ["a", "b"])
    store.fill(some, asked, progress=False)
    found = store.measured(some, asked)
    with tqdm(disable=True) as bar:
        expected = measure(files, ["a", "b"], {"light": brightness}, bar)
    assert found.scores == expected.scores and found.statistics == expected.statistics
    assert all((a == b).all() for a, b in zip(found.thumbnails, expected.thumbnails, strict=True))


def test_another_file_in_the_place_of_what_is_kept(tmp_path):
    (tmp_path / "m.sqlite").write_text("words " * 200)
    with pytest.raises(UserError, match="not a score cache"):
        MeasurementStore(tmp_path / "m.sqlite")
