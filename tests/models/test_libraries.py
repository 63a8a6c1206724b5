"""The libraries of a pipeline are imported without collections of garbage, which come back after it."""

import gc
import importlib

import pytest

from diffalign.models import libraries


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_imports_are_not_interrupted_by_collections(monkeypatch, collects, fails):
    seen = {}

    def imported(name):
        seen[name] = gc.isenabled()
        if fails:
            raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        if fails:
            with pytest.raises(ImportError):
                libraries.import_libraries()
        else:
            libraries.import_libraries()
            assert tuple(seen) == libraries.LIBRARIES
        after = gc.isenabled()
    finally:
        (gc.enable if before else gc.disable)()
    assert after == collects and not any(seen.values())
