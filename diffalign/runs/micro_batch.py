"""Number of samples with gradient in a micro-batch, and other inputs of an estimate, from a run's settings.

Offline a group counts as a pair. Online it is all samples of a prompt, or ``rollout.part`` of them (of a tree
the best and the worst of a branch); methods that noise a sample at several times count it as often.
"""

from diffalign.config.schema import Run
from diffalign.estimate.workload import Workload
from diffalign.methods import REGISTRY, build
from diffalign.methods._multi_time import Stratified
from diffalign.methods.registry import shape_of


def rivals_of(run: Run) -> int:
    """Return the number of samples in a group."""
    shape = shape_of(run.method["type"], run.rollout) if run.rollout.prompts else "tree"
    if shape in ("tree", "gradients"):
        return 2 if shape == "tree" else 1
    if shape == "distillation":
        return run.rollout.samples
    return run.rollout.part or run.rollout.samples


def may_be_parted(run: Run) -> bool:
    """Return whether ``rollout.part`` may be set: methods that compare need all samples of a prompt."""
    card = REGISTRY[run.method["type"]]
    return bool(run.rollout.prompts) and card.advantages and not card.whole


def strata_of(run: Run) -> int:
    """Return the number of times at which a sample is noised in one step."""
    time = getattr(build(run.method), "time", None)
    return time.count(run.rollout.steps) if isinstance(time, Stratified) else 1


def rows_of(run: Run) -> int:
    """Return the number of samples in a micro-batch, counted once for each time.

    Raises:
        UserError: a method or its settings that do not fit.
    """
    return run.training.batch_size * rivals_of(run) * strata_of(run)


def takes_both_experts(run: Run) -> bool:
    """Return whether the network that is not trained is loaded, too, of two experts: samples take both."""
    return bool(run.rollout.prompts or run.validation.every)


def workload_of(run: Run) -> Workload:
    """Return the workload of a run for an estimate.

    Raises:
        UserError: a method or its settings that do not fit.
    """
    height, width = run.size
    return Workload(
        model=run.model,
        optimizer=run.optimizer,
        training=run.training,
        height=height,
        width=width,
        frames=run.data.frames,
        rows=rows_of(run),
        needs_reference=build(run.method).needs_reference,
        online=bool(run.rollout.prompts),
        both_experts=run.model.expert is not None and takes_both_experts(run),
        adapter_sets=1 + len(REGISTRY[run.method["type"]].assistants),
    )
