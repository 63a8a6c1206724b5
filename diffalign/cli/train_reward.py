"""``diffalign train-reward``: train SPO's step-aware preference model."""

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffalign.cli import INTERRUPTED
from diffalign.cli.common import count, share

if TYPE_CHECKING:
    from diffalign.config.reward_schema import RewardRun

RECIPES = "rewards"

USAGE = """\
usage: diffalign train-reward [CONFIG] [--a.b VALUE ...] [--print-config]

Train SPO's step-aware preference model: a CLIP that scores a diffusion model's clean estimates at any time,
from preferences and that model, which stays frozen. CONFIG is a YAML file or the name of a shipped recipe
({recipes}); flags override it. `step_aware:OUTPUT` is then a reward.

  --resume latest   continue a run from its newest checkpoint, exactly
  --output FOLDER   the run directory
  --print-config    print the resolved configuration as YAML and stop

examples:
  diffalign train-reward tiny_reward --output runs/tiny-reward
  diffalign train-reward sd15_step_aware --data.path 'pickapic/*.parquet' --output runs/spm
  diffalign train-reward sd15_step_aware --reward.decoder madebyollin/taesd --data.path pairs.parquet
  diffalign train-reward runs/spm/config.yaml --resume latest
  accelerate launch --num_processes 4 -m diffalign train-reward sdxl_step_aware
"""


def run(argv: Sequence[str]) -> int:
    """Train, and print where the results are."""
    if {"-h", "--help"} & set(argv):
        print(_help(), end="")
        return 0
    from diffalign.config.io import to_yaml
    from diffalign.errors import UserError
    from diffalign.runs.reward.validate import validate

    if not argv:
        raise UserError(f"train-reward needs a config or flags; shipped recipes: {_recipes()}")
    words = [word for word in argv if word != "--print-config"]
    run, notes = read_with_notes(words)
    if share()[0] == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    if len(words) < len(argv):
        validate(run)
        print(to_yaml(run), end="")
        return 0
    validate(run, needs=("model.path", "data.path"))
    from diffalign.runs.reward.job import train_reward, verdict

    result = train_reward(run)
    if result.interrupted:
        lines = [
            f"interrupted after step {result.steps}; a checkpoint is in {result.output}/checkpoints",
            f"continue: diffalign train-reward {shlex.quote(f'{result.output}/config.yaml')} --resume latest",
        ]
    else:
        lines = [
            f"done: {count(result.steps, 'step')}, {result.seconds:.0f} s of training",
            *verdict(result),
            f"use it as the reward step_aware:{result.output}",
        ]
    if share()[0] == 0:
        print("\n".join(lines), file=sys.stderr)
    return INTERRUPTED if result.interrupted else 0


def read(words: Sequence[str]) -> "RewardRun":
    """Return the run of ``read_with_notes``."""
    return read_with_notes(words)[0]


def read_with_notes(words: Sequence[str]) -> tuple["RewardRun", list[str]]:
    """Return the run of a config, if the first word is one, and dotted flags; and notes to print.

    Raises:
        UserError: an error in either.
    """
    from diffalign.cli.flags import in_its_folder
    from diffalign.config.files import find_config, read_yaml
    from diffalign.config.io import apply_overrides, tree_from
    from diffalign.config.reward_schema import RewardRun

    flags = list(words)
    if not flags or flags[0].startswith("-"):
        return apply_overrides(RewardRun(), flags), []
    file = find_config(name := flags.pop(0), RECIPES)
    run = apply_overrides(tree_from(RewardRun, read_yaml(file), name), flags)
    given = any(word.partition("=")[0] == "--output" for word in flags)
    return (run, []) if given else in_its_folder(run, file)


def _recipes() -> str:
    from diffalign.config.files import shipped_configs

    return ", ".join(shipped_configs(RECIPES))


def _help() -> str:
    from diffalign.cli.help import sections
    from diffalign.config.reward_schema import RewardRun
    from diffalign.runs.reward.validate import MEANINGLESS

    return "\n".join([USAGE.format(recipes=_recipes()), *sections(RewardRun, MEANINGLESS)])
