"""The contract of a method: a class with exactly the Protocol's members trains; nothing else is read."""

import importlib
import json
import re
from dataclasses import fields, replace

import pytest
import torch

from diffalign.cli.methods import defaults
from diffalign.config.build import describe
from diffalign.diffusion.likelihood import PerSample
from diffalign.diffusion.noising import Forward
from diffalign.diffusion.times import Uniform
from diffalign.methods import REGISTRY, build
from diffalign.methods._base import own_first
from diffalign.methods.dpo import DPO
from diffalign.methods.registry import DataKind
from diffalign.strategies import STRATEGIES, wrap
from diffalign.training.diagnostics import HeldOut
from diffalign.types import Method
from tests.helpers import ROOT
from tests.training.toys import Trial, same, weights

MEMBERS = {name for name in vars(Method) if not name.startswith("_")} | {"__call__"}


def bare(inner):
    """Return an object with only the Protocol's members; its numbers are those of ``inner``."""

    class Bare:
        __slots__ = ()
        needs_reference = inner.needs_reference
        noising = Forward()
        reduce = PerSample()

        def at_times(self, times):
            return bare(replace(inner, time=times))

        def __call__(self, policy, reference, batch, generator):
            return inner(policy, reference, batch, generator)

    return Bare()


def test_the_bare_class_has_exactly_the_members():
    own = {name for name in vars(type(bare(DPO()))) if not name.startswith("_")} | {"__call__"}
    assert own == MEMBERS == {"needs_reference", "noising", "reduce", "at_times", "__call__"}
    assert isinstance(bare(DPO()), Method)


@pytest.mark.parametrize("strategies", [(), ({"type": "sft"}, {"type": "sdpo"}, {"type": "anchor"})])
def test_a_class_with_exactly_the_members_trains_like_the_method(strategies):
    """With strategies around it, and measured on held-out pairs by bins of time."""
    runs = []
    for method in (DPO(beta=20.0), bare(DPO(beta=20.0))):
        trial = Trial(method=wrap(method, strategies))
        hook = HeldOut([trial.source.batch(0)], bins=2, method=method)
        trial.hooks = [hook]
        runs.append((weights(trial.run()), hook.history))
    (one, history), (other, others) = runs
    assert same(one, other) and history == others and history[-1][1]["rewards/accuracies"] > 0


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_method_keeps_the_contract_and_is_described_by_what_builds_it(name):
    method = build({"type": name})
    assert isinstance(method, Method)
    assert isinstance(method.at_times(Uniform(0.2, 0.3)), type(method))
    assert isinstance(REGISTRY[name].data, DataKind)
    described = describe(method)
    again = build({"type": name, **described})
    assert again == method and describe(again) == described
    assert {f.name for f in own_first(type(method)) if f.compare} - set(described) <= {"reduce"}


def test_times_of_a_bin_are_what_a_method_draws():
    method = DPO().at_times(Uniform(0.25, 0.5))
    drawn = method.time(64, torch.Generator().manual_seed(0))
    assert float(drawn.min()) >= 0.25 and float(drawn.max()) < 0.5
    assert [f.name for f in fields(method) if getattr(method, f.name) != getattr(DPO(), f.name)] == ["time"]


@pytest.mark.parametrize("name", [*REGISTRY, *STRATEGIES])
def test_listings_show_defaults_that_a_configuration_could_give(name):
    """Own fields first, state left out, and no field without a value (``auto_beta`` has a factory)."""
    card = REGISTRY[name] if name in REGISTRY else STRATEGIES[name]
    cls = card.method if name in REGISTRY else card.strategy
    shown = defaults(cls)
    assert "MISSING" not in json.dumps(shown) and "running" not in shown
    if name in REGISTRY and "time" in shown and "beta" in shown:
        assert list(shown).index("beta") < list(shown).index("time")


def test_cards_name_the_authors_and_the_paper():
    for name, card in REGISTRY.items():
        *_, paper = card.paper.split("; ")  # the last one, where the loss and the baseline have one each
        assert re.match(r"[A-Z][\w'-]+( et al\.| et al\. \d{4})?(, \w| \(as)", paper), (name, card.paper)


def test_docstrings_of_methods_have_formulas_in_paragraphs_of_their_own():
    """A page shows an indented line as code: inside of a paragraph it would cut the sentence."""
    for name in REGISTRY:
        text = importlib.import_module(f"diffalign.methods.{name}").__doc__ or ""
        for block in re.split(r"\n\s*\n", text.strip()):
            indented = [line.startswith("    ") for line in block.split("\n")]
            assert all(indented) or not any(indented), (name, block)


def test_every_method_has_a_page_with_its_formula():
    """``diffalign new method`` writes one; the rest of the page is made of docstring and card."""
    for name in REGISTRY:
        page = ROOT / "docs" / "methods" / f"{name}.md"
        assert page.is_file(), f"no docs/methods/{name}.md, the page by hand of {name}"
        text = page.read_text(encoding="utf-8")
        for part in ("## Formula\n", "$$", "## What the paper reports\n", "## When to use it\n"):
            assert part in text, f"docs/methods/{name}.md has no {part.strip()!r}"
