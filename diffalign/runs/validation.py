"""The hook that samples validation images or videos and detects over-optimisation.

Samples of the validation prompts, always from the same noise, are written to ``<output>/samples/step-N``. In
an online run, or with ``validation.rewards``, they are scored, and each evaluation is compared with that of
step 0: see ``overoptimisation``. The history is in ``<output>/validation.json``.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffalign.config.schema import Run
from diffalign.errors import UserError
from diffalign.evaluation.drawing.samples import Sample
from diffalign.evaluation.drawing.sampling import SamplingSettings, draw, plan
from diffalign.evaluation.evaluate import MIN_PROMPTS
from diffalign.evaluation.measuring.measuring import measure
from diffalign.evaluation.overoptimisation import History, Scores, begin, from_json, scores_of
from diffalign.models.loaded import LoadedModel
from diffalign.models.precision import vae_precision
from diffalign.rewards import load
from diffalign.rewards.specs import weighted
from diffalign.runs.labels import tell_of_list
from diffalign.runs.memory_advice import when_validating
from diffalign.runs.validate import validation_prompts
from diffalign.training.sharding import is_sharded
from diffalign.training.state import TrainState
from diffalign.types import Reward
from diffalign.utils.files import write_atomic
from diffalign.utils.memory import advised


class ValidationHook:
    """Samples, scores and compares every ``validation.every`` steps (0: never), on the first rank.

    A resumed run reads the history up to its checkpoint. If there is none of the same settings, a new history
    begins, and later evaluations are compared with the model at that step.

    Attributes:
        history: the evaluations; None before the first, on other ranks, and where nothing is scored.
    """

    def __init__(
        self,
        run: Run,
        model: LoadedModel,
        trained: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
        load: Callable[[str, str], Reward] = load,
    ):
        """Hold what is needed; rewards are loaded when the run starts.

        Args:
            run: the run.
            model: the pipeline, whose network is trained.
            trained: specs of the rewards that are trained on; with a weight below 0 (``-1*jpeg``) less is
                better.
            say: gets each message for the user once.
            load: (spec, device) -> reward.

        Raises:
            UserError: a spec names no reward, or a reward of ``validation.rewards`` is trained on.
        """
        self._run, self._model, self._say, self._load = run, model, say, load
        self._output, settings = Path(run.output), run.validation
        self._prompts = validation_prompts(run)
        if run.validation.every:
            tell_of_list(self._prompts, say, "of the validation, ")
        self._scores = bool(settings.every and (run.rollout.prompts or settings.rewards))
        learned, watched = ([weighted(spec) for spec in specs] for specs in (trained, settings.rewards))
        self._trained = tuple(reward.name for reward in learned)
        self._lower = tuple(reward.name for reward in [*learned, *watched] if reward.weight < 0)
        self._specs = {reward.name: reward.spec for reward in learned}
        for reward in watched:
            if reward.name in self._specs:
                trained_on = "is trained on and" if reward.name in self._trained else "is there twice and"
                raise UserError(
                    f"validation.rewards has {reward.name!r}, which {trained_on} scored anyway; allowed: "
                    "rewards that the run does not learn from, each name once"
                )
            self._specs[reward.name] = reward.spec
        self._rewards: dict[str, Reward] = {}
        self.history: History | None = None

    def on_start(self, state: TrainState) -> None:
        """Load the rewards; read the history of a resumed run, or evaluate the base."""
        if not self._scores:
            return
        if state.accelerator.is_main_process:
            device = str(state.accelerator.device)
            self._rewards = {name: self._load(spec, device) for name, spec in self._specs.items()}
            count = len(set(self._prompts))
            if count < MIN_PROMPTS and self._trained:
                self._say(
                    f"validation.prompts has {count} prompts: over-optimisation cannot be shown on fewer "
                    f"than {MIN_PROMPTS}, so there will be no alarm"
                )
            self.history = self._read(state.step)
            if self.history is None:
                self.history = begin(state.step, self._measured(state), self._trained, self._lower)
            self._write()
        state.accelerator.wait_for_everyone()

    def on_step(self, state: TrainState) -> None:
        """Evaluate when it is due. All ranks wait for the first."""
        every = self._run.validation.every
        if not every or state.step % every:
            return
        if state.accelerator.is_main_process:
            if self.history is None:
                self._draw(state)
            else:
                self.history = self.history.after(state.step, self._measured(state))
                self._write()
                state.log(self.history.entries[-1].scalars)
                for alarm in self.history.new_alarms:
                    self._say(f"alarm: {alarm.text}")
        elif state.settings.context > 1 or any(map(is_sharded, state.network.parameters())):
            self._draw(state)  # every process must ask a network that is spread over them
        state.accelerator.wait_for_everyone()

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""

    def _draw(self, state: TrainState) -> list[Sample]:
        """Sample the validation prompts, with the same noise each time, under ``samples/step-N``."""
        settings = self._run.validation
        self._model.move_encoders(state.accelerator.device)
        doing = advised("drawing validation samples", when_validating(self._run))
        with doing, state.evaluating(), _decoding(self._model.pipeline.vae):
            folder = self._output / "samples" / f"step-{state.step:06d}"
            if state.accelerator.is_main_process:
                # of a repeated run: names do not depend on weights
                for old in folder.glob("[0-9]*-*.*"):
                    old.unlink()
            planned = plan(
                self._model.pipeline,
                self._prompts,
                sampling_of(self._run, self._model),
                images_per_prompt=settings.images_per_prompt,
                seed=settings.seed,
                folder=folder,
                by_position=True,
            )
            if not state.accelerator.is_main_process:
                planned = replace(planned, folder=None)
            samples = draw(self._model.pipeline, planned, progress=False)
        self._model.free_encoders()
        state.log_media({_title(s): s.source for s in samples if isinstance(s.source, Path)})
        return samples

    def _measured(self, state: TrainState) -> Scores:
        samples = self._draw(state)
        prompts = [sample.prompt for sample in samples]
        with state.evaluating(averaged=False), tqdm(disable=True) as bar:
            measured = measure([sample.source for sample in samples], prompts, self._rewards, bar)
        return scores_of(measured, prompts, tuple(self._rewards))

    @property
    def _settings(self) -> dict[str, Any]:
        """Return the settings that comparable evaluations share, in JSON's types."""
        v = self._run.validation
        return {
            "prompts": self._prompts,
            "images_per_prompt": v.images_per_prompt,
            "sampling_steps": v.sampling_steps,
            "guidance": v.guidance,
            "seed": v.seed,
            "rewards": self._specs,
            "trained": list(self._trained),
            "lower": list(self._lower),
        } | ({"frames": v.frames, "fps": v.fps} if self._model.codec.video else {})

    @property
    def _file(self) -> Path:
        return self._output / "validation.json"

    def _write(self) -> None:
        if self.history is not None:
            whole = {"settings": self._settings, "history": self.history.to_json()}
            write_atomic(self._file, json.dumps(whole, indent=1))

    def _read(self, step: int) -> History | None:
        """Return the history of a run that continues from ``step``; None if none fits.

        Raises:
            UserError: the file has another form than a run writes.
        """
        if step == 0 or not self._file.is_file():
            return None
        try:
            whole = json.loads(self._file.read_text(encoding="utf-8"))
            same, history = whole["settings"] == self._settings, from_json(whole["history"]).until(step)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._file} cannot be read ({error!r}); allowed: as the run has written it, or no file"
            ) from error
        if not same:
            self._say(
                f"validation settings differ from those of {self._file}: from now on evaluations are "
                f"compared with the model of step {step}"
            )
        return history if same and history.entries else None


def _title(sample: Sample) -> str:
    """Return a sample's name on a dashboard, the same at every step: ``validation/003-0 a red cat``."""
    words = " ".join(sample.prompt.split())
    return f"validation/{sample.position:03d}-{sample.number} {words[:60]}"


def sampling_of(run: Run, model: LoadedModel) -> SamplingSettings:
    """Return the settings that validation prompts are drawn with: the size of training, which the pipeline's
    own default may be far beyond; of videos also their number of frames.
    """
    drawn, data, tokens = run.validation, run.data, run.model.max_sequence_length
    height, width = run.size
    if not model.codec.video:
        return SamplingSettings(
            drawn.sampling_steps, drawn.guidance, height, width, max_sequence_length=tokens
        )
    frames = drawn.frames or data.frames
    return SamplingSettings(
        drawn.sampling_steps,
        drawn.guidance,
        height=height,
        width=width,
        num_frames=None if frames is None else model.usable_frames(frames),
        fps=drawn.fps or data.fps,
        max_sequence_length=tokens,
    )


@contextmanager
def _decoding(vae: Any) -> Iterator[None]:
    """Decode in a precision that suits the VAE inside the context, whatever the precision of the network's
    output.
    """
    decode = vae.decode

    def careful(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        with vae_precision(vae) as exact:
            return decode(latents.to(exact.dtype), *arguments, **options)

    vae.decode = careful
    try:
        yield
    finally:
        del vae.decode
