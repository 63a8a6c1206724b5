"""evaluate, the alarm, report.json and report.html."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.contest import alone
from diffalign.evaluation.evaluate import compare_pipelines, evaluate
from diffalign.evaluation.report.charts import number, tick, ticks
from diffalign.evaluation.report.grids import embed, grid_image
from diffalign.evaluation.report.report import RunFacts, render, report_data, write_report
from diffalign.evaluation.report.sections import duration, verdict
from diffalign.evaluation.report.side_by_side import choose
from diffalign.utils.text import read_json_lines
from tests.evaluation.fakes import PaintingPipeline, brightness

N = 12
PROMPTS = [f"prompt {i}" for i in range(N)]
NASTY = '<script>alert("x")</script> & "quotes"'


def shades(start, step=3, size=(16, 16)):
    return [Image.new("RGB", size, (start + step * i,) * 3) for i in range(N)]


def darkness(images, prompts):
    return -brightness(images, prompts)


def evaluated(base=None, aligned=None, prompts=PROMPTS, **rewards):
    base, aligned = base or shades(100), aligned or shades(110)
    return evaluate(base, aligned, prompts, rewards or {"light": brightness}, progress=False, resamples=500)


def test_means_gains_and_wins_are_those_of_the_scores():
    evaluation = evaluated()
    result = evaluation.primary.comparison
    assert (result.base, result.aligned) == (pytest.approx(116.5), pytest.approx(126.5))
    assert result.gain.interval == pytest.approx([10, 10]) and result.wins == N
    assert evaluation.verdict == "better" and evaluation.alarm == ()
    assert evaluation.rows[3].base == {"light": 109.0} and evaluation.rows[3].images == 1


def test_verdicts():
    assert evaluated(shades(110), shades(100)).verdict == "worse"
    assert evaluated(shades(100), shades(100)).verdict == "no difference shown"
    few = evaluate(shades(100)[:5], shades(110)[:5], PROMPTS[:5], {"light": brightness}, progress=False)
    assert few.verdict == "too few prompts"
    many = evaluated(prompts=["same"] * N)  # twelve images, but one prompt
    assert many.verdict == "too few prompts" and many.rows[0].images == N


def test_the_alarm_sounds_when_another_reward_falls():
    evaluation = evaluated(light=brightness, dark=darkness)
    assert len(evaluation.alarm) == 1 and "dark fell" in evaluation.alarm[0]
    assert evaluated(shades(110), shades(100), light=brightness, dark=darkness).alarm == ()  # nothing rose


def test_the_alarm_sounds_when_pictures_collapse():
    random = np.random.default_rng(0)
    rich = [Image.fromarray(random.integers(0, 120, (16, 16, 3), dtype=np.uint8)) for _ in range(N)]
    words = " ".join(evaluated(rich, shades(110)).alarm)
    assert "edge density fell" in words and "colour entropy fell" in words and "sharpness fell" in words
    few = evaluate(rich[:5], shades(110)[:5], PROMPTS[:5], {"light": brightness}, progress=False)
    assert few.primary.comparison.gain.low > 0 and few.alarm == ()  # no interval of 5 prompts tells


def test_bad_arguments():
    with pytest.raises(UserError, match="11 base images, 12 aligned images and 12 prompts"):
        evaluate(shades(1)[1:], shades(1), PROMPTS, {"light": brightness}, progress=False)
    with pytest.raises(UserError, match="no images"):
        evaluate([], [], [], {"light": brightness}, progress=False)
    with pytest.raises(UserError, match="at least one reward"):
        evaluate(shades(1), shades(1), PROMPTS, {}, progress=False)
    with pytest.raises(UserError, match="'broken' gives nan for the base image of 'prompt 0'"):
        evaluated(broken=lambda images, prompts: torch.full((len(prompts),), float("nan")))


def test_pipelines_are_compared_on_the_same_noise(tmp_path):
    base, aligned = PaintingPipeline(), PaintingPipeline(lift=7)
    options = {"images_per_prompt": 2, "progress": False}
    compared = compare_pipelines(base, aligned, PROMPTS, {"light": brightness}, folder=tmp_path, **options)
    result = compared.evaluation.primary.comparison
    assert result.gain.value == pytest.approx(7, abs=1e-4) and result.prompts == N and result.wins == 2 * N
    assert [s.seed for s in compared.base] == [s.seed for s in compared.aligned]
    assert len(list((tmp_path / "aligned").glob("*.png"))) == 2 * N
    assert [c.name for c in compared.evaluation.statistics][-1] == "diversity"


KEYS = [
    "method",
    "prompts",
    "base",
    "aligned",
    "gain",
    "gain_ci95",
    "win_rate",
    "win_rate_ci95",
    "train_seconds",
    "steps",
    "rewards",
    "image_statistics",
    "alarm",
    "best",
    "verdict",
    "headline",
    "models",
    "versions",
    "seed",
    "settings",
]


def test_report_json_has_the_promised_fields():
    data = report_data(evaluated(light=brightness, dark=darkness), RunFacts("dpo", 12.5, 100, {"a": 1}))
    assert list(data) == KEYS
    assert (data["method"], data["prompts"], data["train_seconds"], data["steps"]) == ("dpo", N, 12.5, 100)
    assert data["gain"] == data["rewards"]["light"]["gain"] == pytest.approx(10)
    assert data["gain_ci95"][0] <= data["gain"] <= data["gain_ci95"][1]
    dark = data["rewards"]["dark"]
    assert (dark["win"], dark["tie"], dark["loss"], dark["win_rate"]) == (0, 0, N, 0.0)
    assert data["image_statistics"]["saturation"]["change_ci95"] == [0, 0]
    assert {"python", "torch", "numpy"} <= set(data["versions"])


class Checker(HTMLParser):
    """Collects tags, and that every opened one is closed."""

    VOID = frozenset({"meta", "img", "line", "rect", "circle", "polyline", "path", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def metrics():
    rows = [
        {
            "step": s,
            "loss": 0.7 - s / 1000,
            "rewards/accuracies": 0.5,
            "errors/chosen": 0.0,
            "errors/rejected": s,
        }
        for s in range(50)
    ]
    held = {"heldout/rewards/accuracies": 0.6}
    held |= {f"heldout/{a}-{b}/rewards/accuracies": v for a, b, v in [("0", "0.5", 0.5), ("0.5", "1", 0.7)]}
    return [*rows, {"step": 49, **held}]


def test_the_page_is_well_formed_whole_and_escaped(tmp_path):
    prompts = [NASTY, *PROMPTS[1:]]
    evaluation = evaluated(prompts=prompts, light=brightness, dark=darkness)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics()) + '{"step": 5')
    facts = RunFacts("dpo", 75.0, 100, {"model": {"path": NASTY}}, title=NASTY)
    path = write_report(
        tmp_path / "out", evaluation, shades(100), shades(110), facts, metrics=tmp_path / "metrics.jsonl"
    )
    text = path.read_text()
    page = Checker(text)
    assert "<script>alert" not in text and text.count("<script>") == 1
    assert any(NASTY in t for t in page.texts)
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # nothing is fetched
    assert len(page.all("img")) == 2 * N and all(i["alt"] and i["class"] == "tiny" for i in page.all("img"))
    assert [b["data-order"] for b in page.all("button")] == ["random", "gain", "loss"]
    assert page.texts.count("The aligned model is better.") == 1
    joined = " ".join(page.texts)
    for words in (
        "Possible over-optimisation",
        "1 min 15 s",
        "Implicit accuracy",
        "Accuracy by time",
        "model.path",
    ):
        assert words in joined, words
    assert all(svg["aria-label"] for svg in page.all("svg"))
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "report.html",
        "report.json",
        "scores.jsonl",
        "scores.parquet",
    ]
    assert json.loads((path.parent / "report.json").read_text())["prompts"] == N
    first = json.loads((path.parent / "scores.jsonl").read_text().splitlines()[0])
    assert first == {
        "prompt": NASTY,
        "images": 1,
        "base": {"light": 100.0, "dark": -100.0},
        "aligned": {"light": 110.0, "dark": -110.0},
    }


def test_the_verdict_is_one_plain_sentence_with_its_interval():
    headline, support = verdict(alone(evaluated()))
    assert headline == "The aligned model is better."
    assert "+10.0 (95 % interval +10.0 to +10.0) on 12 prompts" in support
    assert verdict(alone(evaluated(shades(100), shades(100))))[0] == "No difference shown."


def test_pages_without_training_or_time_are_fine():
    page = Checker(render(alone(evaluated(), shades(100), shades(110)), {"aligned": RunFacts("sft")}))
    assert "Training" not in page.texts and "Held-out pairs" not in page.texts


def test_reports_refuse_other_images(tmp_path):
    with pytest.raises(UserError, match="11 base and 12 aligned images for an evaluation of 12 pairs"):
        write_report(tmp_path, evaluated(), shades(100)[1:], shades(110), RunFacts("dpo"))


def test_metrics_with_a_broken_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"m.jsonl line 2"):
        read_json_lines(tmp_path / "m.jsonl")


def test_which_pairs_are_shown():
    chosen = choose([0.0, 3.0, -2.0, 1.0], 2, seed=0)
    assert {i: r["gain"] for i, r in chosen.items() if "gain" in r} == {1: 0, 3: 1}
    assert {i: r["loss"] for i, r in chosen.items() if "loss" in r} == {2: 0, 0: 1}
    assert sorted(r["random"] for r in chosen.values() if "random" in r) == [0, 1]


def test_images_in_the_page():
    uri, tiny = embed(Image.new("RGB", (32, 32), "red"))
    assert tiny and uri.startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).getpixel((5, 5)) == (255, 0, 0)
    uri, tiny = embed(Image.new("RGB", (1024, 512)))
    assert not tiny and Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (448, 224)


def test_the_grid_shows_every_image():
    base, aligned = [Image.new("RGB", (32, 32), "red")] * 5, [Image.new("RGB", (64, 32), "blue")] * 5
    sheet = grid_image(
        base, aligned, PROMPTS[:5], base_scores=[0.1] * 5, aligned_scores=[0.9] * 5, side=64, columns=2
    )
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == 5 * 64 * 64
    assert (pixels == (0, 0, 255)).all(1).sum() == 5 * 64 * 32  # not stretched
    assert sheet.width == 2 * (2 * 64 + 6 + 20) + 20
    with pytest.raises(ValueError, match="5 base images, 5 aligned images and 1 prompts"):
        grid_image(base, aligned, ["a"])


def test_numbers_for_people():
    assert [number(v) for v in (0.0, 0.04471, 21.44, 1234.5, -0.5, 2e-6)] == [
        "0", "0.0447", "21.4", "1234", "\N{MINUS SIGN}0.500", "2.00e\N{MINUS SIGN}06",
    ]  # fmt: skip
    assert number(0.5, 2, sign=True) == "+0.50" and number(float("nan")) == "n/a"
    small = "\N{MINUS SIGN}5e\N{MINUS SIGN}4"
    assert [tick(v) for v in (0.25, 100.0, 0.1 + 0.2, -5e-4, 2e6)] == ["0.25", "100", "0.3", small, "2e6"]
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0]) or ticks(0.0, 1.0) == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 1]
    )
    assert ticks(3.0, 3.0) == [3.0]
    assert [duration(s) for s in (52.3, 200.0, 7500.0)] == ["52 s", "3 min 20 s", "2 h 5 min"]
