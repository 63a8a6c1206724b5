"""Edit pairs on a tiny FLUX.1 Kontext: does DPO make it follow instructions more often on held-out edits?

    python -m benchmarks.edits               # every row that is missing; first the base, 18 minutes of a core
    python -m benchmarks.edits --seeds 1

A row is an arm and a seed, a file under ``benchmarks/rows``; ``edits.md`` is made of all rows that are there.
Every arm starts from the same base and has the same number of steps on the same number of pairs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import arms, edit_world, record
from benchmarks.edit_world import FOLLOWED, JUDGE, KEPT, SCORES, UNTOUCHED
from benchmarks.record import Row, over_seeds, shown, verdict
from diffalign.config.data_schema import DataConfig
from diffalign.config.schema import LoggingConfig, LoraConfig, OptimizerConfig, Run, TrainingConfig
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.methods import build
from diffalign.models.loading import load
from diffalign.tiny_build import kontext

PROMPTS = 256
PREFIX = "edits-"  # of the rows of arms; the base's row is edit-base
TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_mlp",
)


@dataclass(frozen=True)
class Arm:
    """What is trained on: its name, what it is, whether the base draws the pairs, and the settings.

    Attributes:
        beta: of DPO; None: SFT on the winners alone, a control.
        winners: weight of the winners' error beside DPO's loss (strategy ``sft``); 0: none.
    """

    name: str
    says: str
    own: bool
    beta: float | None = 100.0
    rate: float = 5e-4
    steps: int = 80
    winners: float = 0.0


ARMS = (
    Arm("winners", "DPO and the winners' error, pairs of a correct and a wrong render", False, winners=25.0),
    Arm("renders", "DPO alone, the same pairs", False),
    Arm("sft", "SFT on the correct renders alone", False, beta=None),
    Arm("own", "DPO alone, pairs of the base's images, ranked by the judge", True),
)
TITLES = {
    JUDGE: "judge",
    FOLLOWED: "instruction followed",
    UNTOUCHED: "other thing untouched",
    KEPT: "pixels kept",
}
QUESTIONS = {
    JUDGE: "it raises the judge on held-out edits",
    FOLLOWED: "it raises the share of instructions followed",
    UNTOUCHED: "it raises the share of other things that stay what they were",
    KEPT: "it raises the likeness of unedited pixels",
}
HOW = (
    "`python -m benchmarks.edits` makes what is missing. A row of the set is a source, an instruction that "
    "changes a colour (`make the small red circle blue`) and two results. "
    "The base is a tiny FLUX.1 Kontext, trained for {minutes:g} minutes of one core ({trained:,} steps of "
    "{batch}) on drawn edits of the train split, of which {wrong:.0f} % have a wrong target. Pairs are of "
    "{edits:,} edits of the train split: renders of a correct and a wrong result, or the best and the worst "
    "of {samples} images of the base, by the judge; edits whose images are all scored alike are left out. "
    "All arms train LoRA by the ordinary run of `diffalign train`, from the same base.\n\n"
    "Measured are {prompts} edits of the test split, whose captions training never has, in {sampled} "
    "sampling steps from the same noise. *Judge* is the share of statements of the target's caption that "
    "hold in the image: number, sizes, colours, shapes, relation. *Instruction followed* is the share of "
    "images that show the new value at the place of the edited thing, *other thing untouched* of those that "
    "show the other thing where and what it was. *Pixels kept* is 1 minus the mean difference from the "
    "source outside the edit. Gains over the base have 95 % intervals, by a bootstrap over edits and seeds."
    "\n\nHow it was tuned: little, and on a base of 6 minutes. `python -m benchmarks.edits_tuning "
    "own,300,3e-4,40 renders,1000,2e-4,40`, a seed each on 96 edits of the validation split, moved the judge "
    "by less than"
    " 0.001 and the instructions followed by 0.000 and +0.021, so that the larger rate and the {steps} "
    "steps stayed. The first row of DPO on renders alone, seen on the test split, lost things that it "
    "should have left; its run told that the winners' errors rise, which is what the winners' term is "
    "for. Its weight, beta / 4, was not tuned."
)


def run_of(arm: Arm, seed: int) -> Run:
    """Return the run of an arm and a seed."""
    method = {"type": "sft"} if arm.beta is None else {"type": "dpo", "beta": arm.beta}
    run = Run(
        output=str(record.WORK / "work" / f"{PREFIX}{arm.name}-{seed}"),
        method={**method, "time": {"type": "logit_normal", "shift": 2.0}},
        strategies=({"type": "sft", "weight": arm.winners},) if arm.winners else (),
        model=replace(edit_world.model(), lora=LoraConfig(rank=16, targets=TARGETS)),
        data=DataConfig(path=str(edit_world.pairs(arm.own)), resolution=32, cache_batch_size=64),
        optimizer=OptimizerConfig(learning_rate=arm.rate, warmup_steps=10),
        training=TrainingConfig(steps=arm.steps, batch_size=32),
        logging=LoggingConfig(every=10),
    )
    return arms.seeded(run, seed)


def base(prompts: int) -> Row:
    """Return the row of the base and of the autoencoder's ceiling."""
    asked = {**_measured(prompts), "minutes": edit_world.MINUTES, "wrong": kontext.WRONG}
    found = record.known("edit-base", asked)
    if found is None:
        where = edit_world.base()
        figures = json.loads(where.with_name(f"{where.name}.json").read_text(encoding="utf-8"))
        print(f"edit-base: {prompts} held-out edits ...", flush=True)
        row = {
            "figures": figures,
            "scores": edit_world.judged(load(edit_world.model()).pipeline, prompts),
            "ceiling": edit_world.ceiling(prompts),
        }
        found = record.keep("edit-base", asked, row)
    return found


def _measured(prompts: int) -> dict[str, Any]:
    return {
        "base": fingerprint(load(edit_world.model()).pipeline),
        "prompts": prompts,
        "sampling_steps": edit_world.STEPS,
    }


def make(arm: Arm, seed: int, prompts: int) -> Row | None:
    """Return the row of an arm and a seed, read or made; None if another process makes it."""
    run, name = run_of(arm, seed), f"{PREFIX}{arm.name}-{seed}"
    asked = {
        **_measured(prompts),
        "method": build(run.method),
        "lora": run.model.lora,
        "optimizer": run.optimizer,
        "steps": run.training.steps,
        "batch_size": run.training.batch_size,
        "edits": edit_world.PAIRS,
        "samples": edit_world.SAMPLES if arm.own else 0,
        **({"strategies": run.strategies} if run.strategies else {}),
    }

    def facts() -> Row:
        return {
            "arm": arm.name, "seed": seed, "pairs": edit_world.count(run.data.path),
            **edit_world.trained(run, prompts),
        }  # fmt: skip

    return arms.row_of(name, asked, facts, lambda row: gained(row, base(prompts)["scores"]))


def gained(row: Row, start: Mapping[str, list[float]]) -> str:
    """Return the gains of a row over the base's scores, with their intervals, as a line."""
    return ", ".join(f"{name} {shown(over_seeds([arms.gains(row, start, name)]))}" for name in SCORES)


def text(start: Row, rows: Sequence[Row]) -> str:
    """Return ``edits.md``."""
    asked, figures = start["asked"], start["figures"]
    how = HOW.format(
        prompts=asked["prompts"],
        sampled=asked["sampling_steps"],
        minutes=asked["minutes"],
        wrong=100 * asked["wrong"],
        trained=figures["steps"],
        batch=kontext.BATCH,
        edits=edit_world.PAIRS,
        samples=edit_world.SAMPLES,
        steps=ARMS[0].steps,
    )
    lines = [
        "# Edit pairs on a tiny FLUX.1 Kontext",
        "",
        how,
        "",
        f"| model | {' | '.join(TITLES.values())} | pairs | steps | seeds | CPU s |",
        "|---|" + "---|" * (len(TITLES) + 4),
        _plain("base", start["scores"]),
        _plain("correct targets, through the autoencoder", start["ceiling"]),
    ]
    questions = ["", "| is it so? | difference | |", "|---|---|---|"]
    by_arm = record.by_arm(rows)
    for arm in ARMS:
        if not (some := by_arm.get(arm.name)):
            continue
        found = {
            name: over_seeds([arms.gains(row, start["scores"], name) for row in some]) for name in SCORES
        }
        steps = f"{some[0]['asked']['steps']} of {some[0]['asked']['batch_size']}"
        seconds = sum(row["seconds"] for row in some) / len(some)
        lines.append(
            f"| {arm.name}: {arm.says} | {' | '.join(shown(found[name]) for name in TITLES)} "
            f"| {some[0]['pairs']:,} | {steps} | {len(some)} | {seconds:.0f} |"
        )
        for name, says in QUESTIONS.items():
            word = verdict(found[name], "supported", "not supported: it falls")
            questions.append(f"| {arm.name}: {says} | {shown(found[name])} | {word} |")
    return "\n".join([*lines, *questions, "", arms.made_on([start, *rows])]) + "\n"


def _plain(name: str, scores: dict[str, list[float]]) -> str:
    values = [f"{sum(scores[key]) / len(scores[key]):.3f}" for key in TITLES]
    return f"| {name} | {' | '.join(values)} | | | | |"


def main(argv: Sequence[str] | None = None) -> None:
    """Make every row that is requested and missing."""

    def page(prompts: int) -> str:
        start = base(prompts)
        of = start["asked"]["base"]
        return text(start, [row for row in record.rows(PREFIX) if row["asked"]["base"] == of])

    arms.main("edits", __doc__, ARMS, make, page, prompts=PROMPTS, argv=argv)


if __name__ == "__main__":
    main()
