"""The ``export`` section: what a run publishes when it has finished."""

import re
from dataclasses import dataclass

from diffalign.config.fields import Rule, option

_REPOSITORY: Rule = (
    lambda v: re.fullmatch(r"[\w.-]+/[\w.-]+", v) is not None,
    "ORG/NAME, of letters, digits, - _ .",
)


@dataclass(frozen=True)
class ExportConfig:
    """Upload of the result to the Hugging Face hub, with the client's token (`hf auth login`)."""

    push_to_hub: str | None = option(None, "repository ORG/NAME to push aligned/ to at the end", _REPOSITORY)
    private: bool = option(False, "make a new repository private")
    revision: str | None = option(None, "branch to push to; default: main")
