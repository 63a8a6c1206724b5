"""The ``export`` section of a run: what leaves it when it has finished."""

import re
from dataclasses import dataclass

from diffalign.config.fields import Rule, option

_REPOSITORY: Rule = (
    lambda v: re.fullmatch(r"[\w.-]+/[\w.-]+", v) is not None,
    "ORG/NAME, of letters, digits, - _ .",
)


@dataclass(frozen=True)
class ExportConfig:
    """The result on the Hugging Face hub; the token is the client's (`hf auth login`), never a setting."""

    push_to_hub: str | None = option(None, "repository ORG/NAME to push aligned/ to at the end", _REPOSITORY)
    private: bool = option(False, "make a new repository private")
    revision: str | None = option(None, "branch to push to; default: main")
