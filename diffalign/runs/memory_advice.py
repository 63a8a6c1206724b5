"""Advice on memory for each stage of a run."""

from diffalign.config.reward_schema import RewardRun
from diffalign.config.schema import Run


def when_loading(run: "Run | RewardRun") -> list[str]:
    """Return settings that make a loaded model smaller."""
    return _of_dtype(run)


def when_encoding(run: "Run | RewardRun") -> list[str]:
    """Return settings that make encoding need less memory: batches and sizes of the autoencoder's input."""
    at_once = run.data.cache_batch_size
    advice = [f"--data.cache_batch_size 1 (now {at_once})"] if at_once > 1 else []
    return [*advice, *_of_tiles(run), *_of_size(run), *_of_dtype(run)]


def when_training(run: Run) -> list[str]:
    """Return settings that make a training step, and online the sampling of a round, need less memory."""
    advice, training, rollout = [], run.training, run.rollout
    if int(run.model.gradient_checkpointing) != 1:
        advice.append("--model.gradient_checkpointing true (a third more time)")
    if training.batch_size > 1:
        steps = training.batch_size * training.accumulation
        advice.append(f"--training.batch_size 1 --training.accumulation {steps} (the same step)")
    advice += _of_rivals(run)
    if rollout.prompts and rollout.batch_size > 1:
        advice.append(f"--rollout.batch_size 1 (now {rollout.batch_size})")
    if training.mixed_precision == "no":
        advice.append("--training.mixed_precision bf16")
    advice += [*_of_dtype(run), *_of_size(run)]
    if rollout.prompts and rollout.resolution:
        advice[-1] = f"a smaller --rollout.resolution (now {rollout.resolution})"
    if rollout.prompts:
        advice += _of_decoding(run)
    alone = training.shard == "none" and training.context == 1
    if not run.model.offload_activations and not run.model.compile and alone:
        advice.append("--model.offload_activations true (a slower step)")
    advice += _of_moments(run)
    if run.model.train == "full":
        advice.append("--model.train lora")
    return advice


def _of_moments(run: Run) -> list[str]:
    """Return an optimizer of smaller state; where all weights are trained it is as large as they are."""
    kind = run.optimizer.type
    if run.training.shard != "none" or kind not in ("adamw", "adamw8bit", "paged_adamw"):
        return []
    if run.model.train == "full":
        now = 2 if kind == "adamw8bit" else 8
        return [
            f"--optimizer.type paged_adamw8bit (2 bytes a weight, now {now}; in main memory where the GPU is "
            "full)"
        ]
    return ["--optimizer.type adamw8bit"] if kind == "adamw" else []


def _of_rivals(run: Run) -> list[str]:
    """Return settings for fewer samples of a prompt, and fewer times of each, in a gradient batch of an
    online run."""
    from diffalign.runs.micro_batch import may_be_parted, rivals_of, strata_of

    advice: list[str] = []
    if not run.rollout.prompts:
        return advice
    if may_be_parted(run) and (rivals := rivals_of(run)) > 1:
        advice.append(f"--rollout.part 1 (now {rivals}) with {rivals} times the --training.accumulation")
    if (strata := strata_of(run)) > 1:
        advice.append(f"--method.time.strata 1 (now {strata})")
    return advice


def when_validating(run: Run) -> list[str]:
    """Return settings that make sampling of validation images or videos need less memory."""
    frames = run.validation.frames or run.data.frames or 1
    advice = [f"--validation.frames {_fewer(frames)} (now {frames})"] if frames > 1 else []
    return [*_of_tiles(run), *advice, *_of_dtype(run)]


def _fewer(frames: int) -> int:
    """Return about half as many frames: 1 more than a multiple of 8 or 4, as causal autoencoders need."""
    step = 8 if frames > 16 else 4
    return 1 + (frames - 1) // (2 * step) * step


def _of_dtype(run: "Run | RewardRun") -> list[str]:
    return ["--model.dtype bfloat16"] if run.model.dtype == "float32" else []


def _of_tiles(run: "Run | RewardRun") -> list[str]:
    return [] if run.model.vae_tiling else ["--model.vae_tiling true"]


def _of_decoding(run: Run) -> list[str]:
    """Return settings that make the decoding of a round need less memory."""
    frames, most = run.data.frames or 1, run.rollout.decoded_frames
    fewer = [f"--rollout.decoded_frames {frames} (now {most})"] if most > frames > 1 else []
    return [*fewer, *_of_tiles(run)]


def _of_size(run: "Run | RewardRun") -> list[str]:
    """Return settings for smaller inputs: of videos first fewer frames, which cost most."""
    data = run.data
    frames = data.frames or 1
    advice = [f"--data.frames {_fewer(frames)} (now {frames})"] if frames > 1 else []
    if data.height and data.width:
        return [*advice, f"a smaller --data.height and --data.width (now {data.height} and {data.width})"]
    return [*advice, f"a smaller --data.resolution (now {data.resolution})"]
