"""The module names of diffalign 0.1 still import, and say what they are called today."""

import importlib
import subprocess
import sys

import pytest

import diffalign
from diffalign._moved import MOVED
from tests.test_house import modules


@pytest.mark.parametrize("former", sorted(MOVED))
def test_a_former_name_is_the_module_of_today(former):
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=MOVED[former]):
        module = importlib.import_module(former)
    assert module is importlib.import_module(MOVED[former])
    assert module.__name__ == MOVED[former]


def test_no_former_name_hides_a_module_of_today():
    today = {name.partition("diffalign.")[2] for name in modules()}
    assert not {former.partition("diffalign.")[2] for former in MOVED} & today


def test_a_submodule_of_a_former_package_is_not_loaded_twice():
    with pytest.warns(DeprecationWarning, match=r"preferences\.from_scores\.choose"):
        module = importlib.import_module("diffalign.pairing.choose")
    assert module is importlib.import_module("diffalign.preferences.from_scores.choose")


def test_other_names_are_still_errors():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("diffalign.no_such_module")


def test_names_come_out_of_a_former_module():
    code = (
        "from diffalign.data.images import decode; from diffalign.job import align as a; "
        "import diffalign; print(a is diffalign.align, decode.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "diffalign.media.images"]


def test_every_name_of_the_package_is_there() -> None:
    """Names are loaded late, so one whose module lost it fails only where it is first used."""
    assert set(diffalign.__all__) == set(diffalign._HOMES)
    for name, (module, attribute) in diffalign._HOMES.items():
        found = getattr(diffalign, name)
        assert found is getattr(importlib.import_module(module), attribute)
        assert found.__module__ == module, f"{name} is defined in {found.__module__}"
