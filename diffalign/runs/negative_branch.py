"""Opening the negative branch of a model: another run, LoRA or pipeline of its family."""

from diffalign.errors import UserError
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.negative_branch import attach, merged_weights
from diffalign.runs.load_pipeline import named, with_dtype
from diffalign.runs.teachers import folded


def add_negative_branch(
    model: LoadedModel, spec: str, negative: str, base: str | None = None, merge_weight: float = 0.0
) -> None:
    """Guide a model away from what another one says.

    Args:
        model: as it was opened by ``spec``.
        spec: what it was opened by.
        negative: a LoRA, run or pipeline that was trained on flipped preferences.
        base: the model under LoRAs outside of their runs.
        merge_weight: see ``models.negative_branch.merged_weights``; what the model has learnt over its base
            counts 1 - merge_weight times in the negative branch.

    Raises:
        UserError: another family, or a merge weight outside of 0 to 1.
    """
    if not 0 <= merge_weight <= 1:
        raise UserError(f"merge weight {merge_weight} of the negative branch; allowed: 0 to 1")
    found = named(spec, base)
    config = with_dtype(found.model, str(model.dtype).removeprefix("torch."))
    branch = load(folded(config, negative), model.device)
    if found.aligned is not None and merge_weight != 1:
        positive = load(folded(config, str(found.aligned)), "cpu").network.state_dict()
        plain = load(config, "cpu").network.state_dict()
        weights = {name: value.cpu() for name, value in branch.network.state_dict().items()}
        branch.network.load_state_dict(merged_weights(weights, positive, plain, merge_weight))
    attach(model.pipeline, model.network, branch.network, model.family.name)
