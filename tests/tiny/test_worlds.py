"""The table of worlds is the only place that knows one world's name, and it covers every tiny model."""

import ast
from dataclasses import replace

import pytest

from diffalign.cli.train import finished
from diffalign.config.schema import Run
from diffalign.data.prompts.prompt_sets import read_prompts
from diffalign.rewards.registry import parse
from diffalign.runs.align import Result
from diffalign.tiny import FAMILIES
from diffalign.tiny.worlds import MEASURES
from tests.test_house import modules


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tiny_model_is_measured_by_rewards_and_captions_that_exist(name, tmp_path):
    own = MEASURES[name]
    assert len(own.rewards) >= 2  # one is held out
    assert read_prompts(f"tiny:{own.captions}test", 3) == own.prompts("test", 3)
    assert own.few <= len(own.prompts("test"))
    for reward in own.rewards:
        assert parse(reward)[0].name == reward
    run = Run()
    run = replace(run, model=replace(run.model, path=f"tiny:{name}"))
    line = finished(run, Result(tmp_path, tmp_path, 1, 1.0, False, "", ""))[-1]
    assert f"--prompts tiny:{own.captions}test --limit {own.few} " in line
    assert line.endswith(f"--rewards {','.join(own.rewards)}")


def test_no_module_compares_with_the_name_of_one_tiny_model():
    """Such as ``path == "tiny:sdxl"``; building them (diffalign.tiny_build) needs their names."""
    found = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                if words & {f"tiny:{name}" for name in FAMILIES}:
                    found.append(f"{module}:{node.lineno}")
    assert not found
