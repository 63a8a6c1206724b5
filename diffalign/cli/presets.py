"""Presets of other scripts: which script a command line is for, its defaults, and remaining differences.

Facts are of huggingface/diffusers ``examples/research_projects/diffusion_dpo`` (two LoRA scripts, read as one
preset whose model decides), of SalesforceAIResearch/DiffusionDPO ``train.py``, and of TRL's ``DPOConfig``.

On ``--beta_dpo``: method.beta has the 1/2 of the paper, as Salesforce's script and diffusers' SDXL script
have it. Diffusers' SD 1.x script leaves it out: its 2500 is 5000 here, so its preset doubles the flag.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from diffalign.cli.aliases import ALIASES, SCHEDULES, Pairs
from diffalign.config.io import parse_text
from diffalign.config.schema import Run
from diffalign.errors import UserError, unknown
from diffalign.utils.text import read_json

VALIDATION_PROMPTS = (
    "a red bicycle leaning against a white wall",
    "portrait of an old sailor, oil painting",
    "a glass of water on a wooden table, morning light",
    "two foxes playing in the snow",
)
VALIDATION_STEPS = "200"  # the scripts' default
COLUMNS = {"image_column": "image", "caption_column": "prompt"}
"""The roles of ``data.columns`` that flags of the scripts name columns of."""

LATE = (
    "image_column",
    "caption_column",
    "beta_dpo", "beta1", "beta2", "run_validation", "validation_prompt", "validation_steps", "lr_scheduler",
    "sync_ref_model", "num_train_epochs", "label_smoothing",
)  # fmt: skip
"""Pseudo-fields of flags whose meaning depends on the rest of the run."""


@dataclass(frozen=True)
class Preset:
    """A script whose defaults a run may take.

    Attributes:
        title: the script, for messages.
        defaults: texts by field, for every model.
        xl: further defaults for an SDXL.
        other: further defaults for any other model.
        differs: differences that no setting removes, a clause each.
    """

    title: str
    defaults: Mapping[str, str]
    xl: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, str] = field(default_factory=dict)
    differs: Sequence[str] = ()


_OURS = (
    "5 % of the groups are held out for diagnostics (--data.holdout 0 trains on all)",
    "a tie has weight 0 (diffusers: the first image wins; Salesforce: left out)",
    "the seed is 0 where none is given (theirs: random)",
)

PRESETS: Mapping[str, Preset] = {
    "diffusers": Preset(
        "diffusers' Diffusion-DPO script",
        {
            "output": "diffusion-dpo-lora", "data.split": "validation", "data.flip": "true",
            "training.batch_size": "4", "model.train": "lora", "model.lora.rank": "4",
            "optimizer.learning_rate": "5e-4", "optimizer.warmup_steps": "500", "checkpoint.limit": "0",
        },
        {"data.resolution": "1024", "logging.project": "diffusion-dpo-lora-sdxl", "method.beta": "5000"},
        {
            "data.resolution": "512", "logging.project": "diffusion-dpo-lora", "method.beta": "5000",
            "validation.guidance": "7.5",
        },
        (
            *_OURS,
            "validation draws prompts of our own, unless --validation_prompt gives some",
            "an SDXL's two images share one size condition by data's rule",
        ),
    ),
    "salesforce": Preset(
        "Salesforce's Diffusion-DPO script",
        {
            "output": "sd-model-finetuned", "data.flip": "true", "data.prompt_dropout": "0.2",
            "model.train": "full", "model.dtype": "float16", "training.mixed_precision": "fp16",
            "training.steps": "2000", "optimizer.learning_rate": "1e-8", "optimizer.warmup_steps": "500",
            "method.beta": "5000", "checkpoint.limit": "0", "logging.project": "tuning",
        },
        {
            "data.resolution": "1024", "optimizer.type": "adafactor", "model.gradient_checkpointing": "true",
        },
        {"data.resolution": "512"},
        (
            *_OURS,
            "a checkpoint in the output folder is resumed with --resume latest only (theirs: always)",
            "attention is torch's (theirs needs xformers)",
        ),
    ),
    "trl": Preset(
        "TRL's DPOConfig",
        {
            "training.batch_size": "8", "training.seed": "42", "optimizer.learning_rate": "1e-6",
            "optimizer.schedule": "linear", "optimizer.weight_decay": "0", "checkpoint.limit": "0",
        },
        {"data.resolution": "1024"},
        {},
        (
            "TRL's beta of 0.1 is of sums over tokens; here beta is of means over latents (5000)",
            "precision is float32 without --bf16",
            *_OURS[:2],
        ),
    ),
}  # fmt: skip

_ENTRY = {"pretrained_model_name_or_path", "model_name_or_path", "dataset_name"}
"""Flags that a script needs: if none is given, its other flags are translated, but its defaults are not
taken."""


def choose(given: Collection[str], name: str, config: str | None) -> tuple[str, str]:
    """Return the name of a command line's preset, "" for none, and a note on how it was chosen.

    Args:
        given: names of other tools' flags on the command line.
        name: value of ``--flags``, or "".
        config: the configuration file; its values stand in place of a script's defaults.

    Raises:
        UserError: ``name`` names no preset.
    """
    if name:
        if name not in PRESETS and name != "none":
            raise unknown("value of --flags", name, [*PRESETS, "none"])
        return ("" if name == "none" else name), ""
    if config is not None or not _ENTRY & set(given):
        return "", ""
    own: dict[str, list[str]] = {}
    for name in given:
        if script := ALIASES[name].script:
            own.setdefault(script, []).append(f"--{name}")
    if len(own) == 1:
        script, names = next(iter(own.items()))
        return script, f"flags are read as those of {PRESETS[script].title} ({names[0]} is its own)"
    if own:
        mixed = "; ".join(f"{', '.join(names)}: {script}" for script, names in own.items())
        return "", f"flags are of several scripts ({mixed}), so no script's defaults are taken; {_SAY}"
    return "", f"no flag is one script's own, so no script's defaults are taken; {_SAY}"


_SAY = "--flags diffusers (LoRA), --flags salesforce (all weights) or --flags trl takes theirs"


def defaults(name: str, run: Run, given: Collection[str]) -> tuple[Pairs, list[str]]:
    """Return the fields that a preset sets for a model, and the notes: its defaults and what still differs.

    Args:
        name: of the preset.
        run: with all flags applied; its model decides between the scripts of a preset.
        given: names of other tools' flags on the command line.
    """
    preset = PRESETS[name]
    family = family_of(run)
    xl = family == "sdxl" or (family is None and _like_xl(run))
    pairs = list({**preset.defaults, **(preset.xl if xl else preset.other)}.items())
    if _has_no_splits(run.data.path):
        pairs = [(target, value) for target, value in pairs if target != "data.split"]
    if xl and name == "salesforce" and "sdxl" not in given:
        pairs.append(("model.family", "sdxl"))
    shown = ", ".join(f"{target} {value}" for target, value in pairs)
    kind = "an SDXL" if xl else "a model that is no SDXL"
    assumed = " (assumed)" if family is None else ""
    return pairs, [
        f"defaults of {preset.title} for {kind}{assumed}, unless set by a flag: {shown}",
        f"what still differs from {preset.title}: {'; '.join(preset.differs)}",
    ]


def _has_no_splits(path: str) -> bool:
    """Whether a set is a file of this disk, or an embedded one: the scripts' default is that of a hub set."""
    return path.startswith("tiny:") or (bool(glob(path)) and not Path(path).is_dir())


_EPOCHS = {"diffusers": "1", "trl": "3"}
"""Default epochs of the scripts, used if no number of steps is given."""


def late(
    run: Run, given: Mapping[str, list[str]], preset: str = "", stepped: bool = False
) -> tuple[Pairs, list[str]]:
    """Return fields, and notes to print, of the flags whose meaning depends on the rest of the run.

    Args:
        run: with every other flag applied.
        given: texts by pseudo-field, those of ``LATE``.
        preset: name of the script whose flags they are, or "".
        stepped: whether a number of steps, or of epochs, is given as such.
    """
    pairs: Pairs = []
    notes: list[str] = []
    if "beta_dpo" in given:
        text, value = given["beta_dpo"][-1], parse_text(given["beta_dpo"][-1], float)
        if not isinstance(value, int | float):
            raise UserError(f"--beta_dpo={text!r}; allowed: a number")
        doubled = preset == "diffusers" and not (family_of(run) == "sdxl" or _like_xl(run))
        pairs.append(("method.beta", str(2 * value if doubled else value)))
        how = "of diffusers' SD 1.x script, which has no 1/2" if doubled else "with the paper's 1/2"
        notes.append(f"--beta_dpo {text} is read as {how}: method.beta = {pairs[-1][1]}")
        if not preset and family_of(run) == "sd15":
            notes[-1] += f" (--flags diffusers, whose SD 1.x script has no 1/2, would make it {2 * value:g})"
    if "beta1" in given or "beta2" in given:
        first, second = (given.get(f"beta{i}", [str(run.optimizer.betas[i - 1])])[-1] for i in (1, 2))
        pairs.append(("optimizer.betas", f"{first},{second}"))
    columns = [f"{role}={given[name][-1]}" for name, role in COLUMNS.items() if name in given]
    if columns:
        pairs.append(("data.columns", ",".join([*run.data.columns, *columns])))
    pairs += _schedule(run, given, preset, notes)
    epochs = given.get("num_train_epochs", [_EPOCHS.get(preset, "")])[-1]
    if epochs and (stepped or preset == "salesforce"):
        if "num_train_epochs" in given:
            notes.append(
                f"--num_train_epochs {epochs} has no effect: the number of steps decides, as in the scripts "
                f"(training.steps is {run.training.steps})"
            )
    elif epochs and not run.rollout.prompts:
        pairs.append(("training.epochs", epochs))
    if preset and _loss_of(run) == "ipo":
        notes.append(
            "the loss ipo is (beta h - 1/2)^2, which is beta^2 times (h - 1/(2 beta))^2 of the scripts: the "
            "minimum is the same, gradients are larger and are clipped by training.max_grad_norm"
        )
    if "label_smoothing" in given:
        pairs += _smoothed(run, given["label_smoothing"][-1])
    if "sync_ref_model" in given:
        pairs += [("training.reference_every", "512")] if not run.training.reference_every else []
        pairs += [("training.reference_mix", "0.6")] if run.training.reference_mix == 1 else []
    return [*pairs, *_validation(run, given, notes)], notes


def _smoothed(run: Run, text: str) -> Pairs:
    """Return the field of TRL's ``label_smoothing``, which two of its losses read."""
    kind = _loss_of(run)
    if kind == "robust":
        return [("method.loss.label_noise", text)]
    if kind == "logistic":
        return [("method.loss.type", "logistic"), ("method.loss.label_smoothing", text)]
    raise UserError(
        f"--label_smoothing {text} with the loss {kind}, which has none; allowed: sigmoid, robust"
    )


def _loss_of(run: Run) -> str:
    """Return the name of the loss that a run's method is given; that of DPO by default."""
    loss = run.method.get("loss", {})
    return str(loss.get("type", "logistic") if isinstance(loss, Mapping) else loss)


def _schedule(run: Run, given: Mapping[str, list[str]], preset: str, notes: list[str]) -> Pairs:
    """Drop the warm-up of ``constant``, as diffusers' get_scheduler does, whatever is given."""
    name = given["lr_scheduler"][-1] if "lr_scheduler" in given else ""
    if name and name not in SCHEDULES:
        raise unknown("value of --lr_scheduler", name, SCHEDULES)
    pairs = [("optimizer.schedule", SCHEDULES[name])] if name else []
    name = name or ("constant" if preset == "diffusers" else "")
    if name == "constant" and run.optimizer.warmup_steps:
        if name in given.get("lr_scheduler", ()):
            notes.append(
                f"--lr_scheduler constant has no warm-up in the scripts: optimizer.warmup_steps "
                f"{run.optimizer.warmup_steps} becomes 0 (constant_with_warmup keeps it)"
            )
        pairs.append(("optimizer.warmup_steps", "0"))
    return pairs


def _validation(run: Run, given: Mapping[str, list[str]], notes: list[str]) -> Pairs:
    pairs: Pairs = []
    prompts = [text for text in given.get("validation_prompt", []) if text]
    if "run_validation" in given and not prompts and not run.validation.prompts:
        prompts = list(VALIDATION_PROMPTS)
        notes.append(
            f"--run_validation without a --validation_prompt draws {len(prompts)} prompts of our own"
        )
    if prompts:
        pairs.append(("validation.prompts", "[" + ", ".join(f'"{_escaped(p)}"' for p in prompts) + "]"))
    steps = given.get("validation_steps", [""])[-1]
    if steps and not (prompts or run.validation.prompts):
        notes.append(f"--validation_steps {steps} has no effect without --run_validation or prompts")
    elif steps:
        pairs.append(("validation.every", steps))
    elif prompts and not run.validation.every:
        pairs.append(("validation.every", VALIDATION_STEPS))
    return pairs


def family_of(run: Run) -> str | None:
    """Return the family of a run's model where it is known without the network: by its setting, its name, or
    its folder's model_index.json; None where it is not.
    """
    from diffalign.models.families.registry import FAMILIES
    from diffalign.tiny import FAMILIES as TINY

    path = run.model.path
    if run.model.family != "auto":
        return run.model.family
    if path.startswith("tiny:"):
        return TINY.get(path.removeprefix("tiny:"))
    for name, card in FAMILIES.items():
        if path in card.same_shapes:
            return name
    index = Path(path, "model_index.json")
    if not path or not index.is_file():
        return None
    found = read_json(index)
    pipeline = found.get("_class_name") if isinstance(found, dict) else None
    return next((name for name, card in FAMILIES.items() if card.pipeline == pipeline), None)


def _like_xl(run: Run) -> bool:
    """Whether a model of unknown family is named like an SDXL, or has another autoencoder, as SDXLs have."""
    return family_of(run) is None and ("xl" in run.model.path.lower() or run.model.vae is not None)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
