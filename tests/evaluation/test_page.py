"""The report in a real browser: its controls at desktop and phone sizes."""

import shutil

import numpy as np
import pytest
from PIL import Image

from diffalign.evaluation.contest import contest
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.report.report import RunFacts, render
from tests.evaluation.fakes import brightness

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

N = 40
PROMPTS = [f"prompt {i} <b>&amp;" for i in range(N)]
KINDS = ["round", "square", "long"]
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
PRIMARY = "light"


def metrics():
    return [{"step": s, "loss": 0.7 - s / 100, "rewards/accuracies": 0.5 + s / 100} for s in range(20)]


@pytest.fixture(scope="module")
def found():
    random = np.random.default_rng(0)
    noise = random.integers(60, 180, (N, 24, 32, 3))

    def painted(lift):
        change = random.normal(lift, 12, N).clip(-50, 60)
        return [Image.fromarray((p + c).astype(np.uint8)) for p, c in zip(noise, change, strict=True)]

    base, models = painted(0), {"first": painted(0), "best of all": painted(15), "third": painted(6)}
    rewards = {PRIMARY: brightness, "dark": lambda images, prompts: -brightness(images, prompts)}
    evaluations = {
        name: evaluate(base, images, PROMPTS, rewards, resamples=500, progress=False)
        for name, images in models.items()
    }
    axes = {"shape": [KINDS[i % 3] for i in range(N)], "rare": ["once"] + [""] * (N - 1)}
    return contest(base, models, evaluations, axes)


@pytest.fixture(scope="module")
def report(found, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    facts = {name: RunFacts("dpo", 80.0, 20, {"sampling": {"steps": 20}}) for name in found.names}
    file.write_text(render(found, facts, "three models", {"best of all": metrics()}), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(params=SIZES)
def page(browser, report, request):
    """Open the page, which must request nothing and report no errors."""
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    asked, complaints = [], []
    page.on("request", lambda r: None if r.url.startswith("data:") else asked.append(r.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    yield page
    assert asked == [report.as_uri()] and complaints == []
    page.close()


def tops(page):
    return page.eval_on_selector_all("h2", "all => all.map(h => h.getBoundingClientRect().top + scrollY)")


def visible(page, what):
    """Return the texts of the visible elements."""
    return page.eval_on_selector_all(
        what,
        "all => all.filter(e => e.offsetParent !== null && getComputedStyle(e).visibility === 'visible')"
        ".map(e => e.innerText)",
    )


def shown(page, name):
    """Return the changes of the pairs that the page has for a model, in their order."""
    return page.eval_on_selector_all(
        f"[data-model='{name}'] figure.pair",
        "all => all.filter(f => !f.hidden).map(f => Number(f.dataset.change))",
    )


def test_the_verdict_is_what_one_sees_first(page):
    assert visible(page, "h1") == ["best of all is the best of 3, and better than the base."]
    box = page.locator("h1").bounding_box()
    assert box["y"] + box["height"] < 400 and box["x"] + box["width"] <= page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_picking_a_model_changes_what_is_shown_and_moves_nothing(page, found):
    values = "[data-model] .numbers .value"
    before, places = visible(page, values), tops(page)
    assert list(page.locator("button[data-choose]").all_inner_texts()) == list(found.order)
    page.get_by_role("button", name="third", exact=True).click()
    assert page.locator("button[data-choose][aria-pressed=true]").all_inner_texts() == ["third"]
    after = visible(page, values)
    assert len(after) == len(before) > 0 and after != before
    assert f"{found.evaluations['third'].primary.comparison.win_rate.value:.1%}".replace("%", " %") in after
    assert tops(page) == places
    page.get_by_role("button", name="best of all", exact=True).click()
    assert visible(page, values) == before and tops(page) == places
    assert "Nothing is known of the training of this model." not in visible(page, ".soft")


def test_pairs_are_ordered_by_the_buttons(page, found):
    primary = found.evaluations["best of all"].primary
    gains = np.subtract(primary.aligned_scores, primary.base_scores)
    count = 24 // 3
    for label, expected in (
        ("Largest gains", sorted(gains, reverse=True)),
        ("Largest losses", sorted(gains)),
    ):
        page.get_by_role("button", name=label).click()
        assert page.locator("button[data-order][aria-pressed=true]").all_inner_texts() == [label]
        assert shown(page, "best of all") == pytest.approx(expected[:count], abs=1e-3)
    page.get_by_role("button", name="Random").click()
    assert len(shown(page, "best of all")) == len(shown(page, "first")) == count


def test_pairs_are_filtered_by_category(page):
    page.get_by_role("button", name="Largest losses").click()
    page.get_by_label("Category").select_option("shape: square")
    changes = shown(page, "best of all")
    assert len(changes) >= 4 and changes == sorted(changes)
    of = page.eval_on_selector_all(
        "[data-model='best of all'] figure.pair:not([hidden])", "all => all.map(f => f.dataset.of)"
    )
    assert all("shape: square" in categories.split("\n") for categories in of)
    page.get_by_label("Category").select_option("rare: once")
    assert len(shown(page, "best of all")) == 1
    page.get_by_label("Category").select_option("")
    assert len(shown(page, "best of all")) == 8


def test_settings_unfold(page):
    summary = page.get_by_text("Settings", exact=True)
    assert "sampling.steps" not in " ".join(visible(page, "td"))
    summary.click()
    assert "sampling.steps" in visible(page, "td")


def test_images_have_their_place_before_they_are_loaded(page):
    ratios = page.eval_on_selector_all("figure.pair img", "all => all.map(i => i.width / i.height)")
    boxes = [ratio for ratio in ratios if ratio > 0]
    assert boxes and boxes == pytest.approx([32 / 24] * len(boxes), rel=0.02)


def test_without_a_script_everything_is_there(browser, report, found):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    for name in found.names:
        for part in page.locator(f"[data-model='{name}']").all():
            assert part.is_visible()
    context.close()
