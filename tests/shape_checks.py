"""The type checker of the test suite: shapes are checked wherever an annotation states them.

The import hook of ``tests/conftest.py`` passes functions of the mathematics through ``checked``. Hints that
name no array are left to mypy: tests pass stand-ins for networks, pipelines and data, and a check of each of
those would say nothing about shapes.
"""

from types import FunctionType
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray


def names_an_array(hint: Any) -> bool:
    """Return whether a hint is an array of jaxtyping, or made of such."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(names_an_array(part) for part in get_args(hint))


def checked(function: Any) -> Any:
    """Return the function with its arrays checked by beartype; the function itself where it has none."""
    if not isinstance(function, FunctionType):
        return function
    shaped = {name: hint for name, hint in function.__annotations__.items() if names_an_array(hint)}
    if not shaped:
        return function
    f = function
    copy = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = f.__kwdefaults__, shaped
    copy.__qualname__, copy.__module__ = f.__qualname__, f.__module__
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(copy)
