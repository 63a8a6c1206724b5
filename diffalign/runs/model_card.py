"""The model card that training writes beside the result."""

from collections.abc import Mapping
from dataclasses import asdict

from diffalign.config.schema import Run
from diffalign.evaluation.report.report import package_versions
from diffalign.export.aligned import absent_components
from diffalign.export.card import Card
from diffalign.methods import REGISTRY
from diffalign.models.experts import FOLDERS, changing
from diffalign.models.loaded import LoadedModel
from diffalign.models.starting import expanded
from diffalign.runs.exporting import paper_of


def card_of(
    run: Run,
    model: LoadedModel,
    about: Mapping[str, str],
    held_out: Mapping[str, float],
    note: str,
) -> Card:
    """Return the card of a run's result.

    Args:
        run: the configuration.
        model: what was trained.
        about: what is told of the training, by name.
        held_out: totals of the last diagnostics; online they are of the policy's own samples.
        note: the verdict of the diagnostics.
    """
    kind = "" if run.rollout.prompts else "held-out "
    base = expanded(run.model)
    return Card(
        base_model=base.path,
        started=changing(base.adapter, base.expert),
        experts=tuple(FOLDERS[n] for n in FOLDERS if n in {model.family.network_name, *model.carried})
        if model.split
        else (),
        family=model.family.name,
        adapted=run.model.train == "lora",
        method=REGISTRY[run.method["type"]].title,
        paper=paper_of(run),
        versions=package_versions(),
        numbers={**about, **{f"{kind}{name}": value for name, value in held_out.items()}},
        settings=asdict(run),
        note=note,
        absent=absent_components(model),
    )
