"""The section of the report on FID and LPIPS."""

from diffalign.evaluation.contest import Contest
from diffalign.evaluation.evaluate import Evaluation
from diffalign.evaluation.report.charts import number
from diffalign.evaluation.report.numbers import decimals, fixed, span
from diffalign.evaluation.report.page import section, stack, table


def distances(contest: Contest) -> str:
    """Return FID against real images and LPIPS to the base; empty where neither was measured."""
    if all(e.fid is None and e.lpips_to_base is None for e in contest.evaluations.values()):
        return ""
    lead = []
    fid = contest.leading.fid
    if fid is not None:
        lead.append(
            f"FID is the Frechet distance of Inception's features to those of {fid.real:,} real images, from "
            f"{fid.images:,} images of each model (lower is closer; torchmetrics, resized with antialiasing)."
        )
        lead += [f"{fid.caution}."] if fid.caution else []
    if contest.leading.lpips_to_base is not None:
        lead.append(
            "LPIPS to the base is the distance (AlexNet) of base and aligned sample of the same noise: 0 "
            "where alignment changed nothing, with a 95 % interval over prompts."
        )
    bodies = {name: _distances(evaluation) for name, evaluation in contest.evaluations.items()}
    return section("FID and LPIPS", " ".join(lead), stack(bodies))


def _distances(evaluation: Evaluation) -> str:
    rows = []
    if evaluation.fid is not None:
        base, aligned = evaluation.fid.base, evaluation.fid.aligned
        rows.append(["FID", number(base, 4), number(aligned, 4), number(aligned - base, 3, sign=True)])
    if evaluation.lpips_to_base is not None:
        value = evaluation.lpips_to_base
        rows.append(["LPIPS to the base", "", fixed(value.value, decimals(value)), span(value, False)])
    return table(["", "base", "aligned", "change, or 95 %"], rows)
