"""The online source: it samples a round with the current policy, has it scored, and yields batches of it.

A round is kept on disk (``rollout.store``) while it is trained on. Noise and random choices depend on (seed,
position of the prompt in the run) alone. Scoring may overlap sampling: the source waits for a part's scores
after it has sampled the next part.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffalign.config.schema import RolloutConfig
from diffalign.diffusion.randomness import Streams, derive, permutation
from diffalign.rollout.advantages import PromptHistory, advantages
from diffalign.rollout.judges import Judge, combined
from diffalign.rollout.labels import labelled
from diffalign.rollout.model import RolloutModel
from diffalign.rollout.rounds import Plan, PromptOrder, Round, best_and_worst, in_parts, only
from diffalign.rollout.setting import Setting, Teachers
from diffalign.rollout.shapes import Request, Sampled, samples, trajectories
from diffalign.rollout.store import NOWHERE, Part, RoundStore
from diffalign.rollout.tree import tree
from diffalign.types import Batch, Cond, Denoiser, Transition
from diffalign.utils.distributed import gathered
from diffalign.utils.transfer import sent

SHAPES = {"samples": samples, "trajectories": trajectories, "tree": tree}


@dataclass(frozen=True)
class SamplingRoles:
    """The policy (unwrapped), the reference whose means are recorded (None: not recorded; or several, each
    for some prompts), and the module that is set to evaluation mode during sampling.
    """

    policy: Denoiser
    reference: Denoiser | Teachers | None
    network: nn.Module


@dataclass
class RoundReport:
    """The figures of a round for the log, by name, and the number of images of all rounds on this rank."""

    round: int = -1
    figures: dict[str, float] = field(default_factory=dict)
    images: int = 0


class OnlineSource:
    """Endless micro-batches of one rank; a ``types.Source``."""

    def __init__(
        self,
        roles: SamplingRoles,
        model: RolloutModel,
        judge: Judge,
        prompts: Sequence[str],
        *,
        config: RolloutConfig,
        shape: str,
        setting: Setting,
        plan: Plan,
        seed: int = 0,
        store: RoundStore = NOWHERE,
        check: Callable[[Tensor], None] = lambda scores: None,
    ):
        """Hold everything that a round needs.

        Args:
            roles: policy, reference and network.
            model: encodes prompts and decodes latents.
            judge: scores samples.
            prompts: all of them; every epoch has an order of its own.
            config: the run's rollout section.
            shape: samples, trajectories or tree.
            setting: how to sample.
            plan: the split of rounds into micro-steps.
            seed: of noise, choices and orders.
            store: where rounds are kept.
            check: gets a round's scores of all ranks, (N, S, K), before anything is learned from them.
        """
        self._roles, self._model, self._judge = roles, model, judge
        self._prompts = PromptOrder(prompts, seed)
        self._config, self._shape, self._setting, self._plan = config, shape, setting, plan
        self._seed, self._store, self._check = seed, store, check
        self._micro_step = 0
        self._unfinished = -1
        self._round: tuple[int, Round] | None = None
        self._history = (-1, PromptHistory())
        self.report = RoundReport()

    def seek(self, micro_step: int) -> None:
        """Continue as if ``micro_step`` micro-batches had been drawn; delete later rounds, which another
        policy sampled.
        """
        self._micro_step, self._round = micro_step, None
        number = self._plan.place(micro_step).round
        # A checkpoint inside a round needs the samples of the earlier policy while it is the newest one.
        self._unfinished = number if micro_step % self._plan.micro_steps else -1
        self._store.forget_after(number)

    def __iter__(self) -> Iterator[Batch[Any]]:
        """Endless micro-batches, from where ``seek`` has put it.

        Raises:
            Paused: the round waits for people's labels.
        """
        while True:
            place = self._plan.place(self._micro_step)
            batch = self._of(place.round).batch(place)
            self._micro_step += 1
            yield batch

    def close(self) -> None:
        """Close the judge."""
        self._judge.close()

    def prompts_of(self, number: int) -> list[str]:
        """Return this rank's prompts of a round."""
        return [self._prompts[self._plan.position(number, row)] for row in range(self._plan.prompts)]

    def _of(self, number: int) -> Round:
        if self._round is None or self._round[0] != number:
            self._round = None  # frees the old round before the new one is sampled
            self._round = (number, self._made(number))
        return self._round[1]

    def _made(self, number: int) -> Round:
        prompts = self.prompts_of(number)
        with torch.no_grad(), _evaluating(self._roles.network), self._model.opened():
            cond, negative = self._model.encode(prompts)
            parts = []
            quiet = self._plan.rank != 0 or self._store.folder is None
            with tqdm(
                desc=f"sampling round {number}", total=len(prompts), unit="prompt", leave=False, disable=quiet
            ) as bar:
                for part in self._parts(number, prompts, cond, negative):
                    parts.append(part)
                    bar.update(len(part["shared"]))
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        score = self._scores(number, prompts, whole)
        made = self._assembled(number, prompts, cond, negative, whole, score)
        useful = torch.cat(gathered(made.useful.float().flatten()))
        self.report.figures["rollout/useful"] = float(useful.mean())
        self._store.forget_before(number, but=self._unfinished)
        self.report.images = (number + 1) * len(prompts) * self._setting.samples
        return made

    def _parts(self, number: int, prompts: list[str], cond: Cond, negative: Cond) -> Iterator[Part]:
        """Yield the parts of a round, from disk or sampled now; one is scored while the next one is
        sampled."""
        size = max(1, self._config.batch_size // self._setting.samples)
        starts = range(0, len(prompts), size)
        waiting: deque[tuple[int, Part, list[Future[Tensor]]]] = deque()
        for start in starts:
            known = self._store.load(number, start)
            if known is None:
                rows = range(start, min(start + size, len(prompts)))
                sampled = self._sampled(number, rows, cond, negative)
                waiting.append((start, *self._shown(sampled, [prompts[row] for row in rows])))
            while waiting and (known is not None or len(waiting) > 1 or _done(waiting[0][2])):
                yield self._settled(number, *waiting.popleft())
            if known is not None:
                yield known
        while waiting:
            yield self._settled(number, *waiting.popleft())

    def _sampled(self, number: int, rows: range, cond: Cond, negative: Cond) -> Sampled:
        """Sample some prompts of a round now."""
        device = self._model.device

        def pick(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: sent(v[rows.start : rows.stop], device) for k, v in values.items()}

        setting = replace(self._setting, round=number)
        who = self._roles.reference
        prompts = self.prompts_of(number)
        reference = who.of([prompts[row] for row in rows]) if isinstance(who, Teachers) else who
        request = Request(self._roles.policy, reference, pick(cond), pick(negative), setting)
        random = Streams([derive(self._seed, "rollout", self._plan.position(number, row)) for row in rows])
        return SHAPES[self._shape](request, self._model.shape, random)

    def _shown(self, sampled: Sampled, prompts: list[str]) -> tuple[Part, list[Future[Tensor]]]:
        """Return the tensors of a part without scores, and the futures of its scores, in order: as many as
        the part is decoded in pieces.
        """
        part = _as_part(sampled)
        n, j, k = sampled.judged.shape[:3]
        latents = sampled.judged.flatten(0, 2)
        if self._config.by == "people":
            pixels = self._model.decode(latents)
            part["pixels"] = (pixels[:, :3] * 255).round().to(torch.uint8).reshape(n, j, k, *pixels.shape[1:])
            return part, []
        part["scores"] = torch.zeros(n, j, k, len(self._judge.rewards))
        if not self._judge.rewards:
            return part, []
        repeated = [prompt for prompt in prompts for _ in range(j * k)]
        times = sampled.at.float().repeat_interleave(k).repeat(n)
        size = self._model.at_once or len(latents)
        judged = [
            self._judge.submit(
                self._model.decode(latents[i : i + size]), repeated[i : i + size], times[i : i + size]
            )
            for i in range(0, len(latents), size)
        ]
        return part, judged

    def _scores(self, number: int, prompts: list[str], whole: Part) -> Tensor:
        """Return the scores (N, J, K) or (N, J, K, R) of this rank; log the figures of all ranks."""
        if self._config.by == "people":
            raw = labelled(self._store.round(number), prompts, whole["pixels"][:, 0])[:, None, :, None]
        else:
            raw = whole["scores"]
        names, together, own = self._of_all_ranks(number, prompts, raw)
        self._tell(number, names, together)
        scores = combined(together, self._judge.weights, self._config)
        self._check(scores)
        return scores[own]

    def _of_all_ranks(
        self, number: int, prompts: list[str], values: Tensor
    ) -> tuple[list[str], Tensor, Tensor]:
        """Return (prompts, values) of all ranks in the order of the run, and the rows of this rank."""
        positions = torch.tensor([self._plan.position(number, row) for row in range(len(prompts))])
        everyone = gathered((positions, prompts, values))
        places = torch.cat([places for places, _, _ in everyone])
        names = [prompt for _, some, _ in everyone for prompt in some]
        order = places.argsort()
        together = torch.cat([part for _, _, part in everyone])[order]
        return [names[i] for i in order], together, torch.searchsorted(places[order], positions)

    def _assembled(
        self, number: int, prompts: list[str], cond: Cond, negative: Cond, whole: Part, score: Tensor
    ) -> Round:
        verdict, shared = whole["verdict"][0], whole["shared"]
        x: Tensor | Transition = whole["x"] if "x" in whole else Transition(
            *(whole[name] for name in Transition._fields)
        )  # fmt: skip
        extra: dict[str, Tensor] = {k: whole[k] for k in ("reference_mean", "drawn_mean") if k in whole}
        score = score[:, verdict]
        if self._shape == "tree":
            pair, score = best_and_worst(score, self._config.threshold)
            x = Transition(*(only(value, pair) for value in x))
            extra = {name: only(value, pair) for name, value in extra.items()}
        if self._setting.by_reference:
            theirs = torch.zeros(score.shape[:3])
            theirs[..., -1] = 1
            extra["of_reference"] = theirs
        if self._config.advantage != "none":
            extra["advantage"] = self._advantages(number, prompts, score)
        if self._config.part:
            x, score, shared, extra = in_parts(x, score, shared, extra, self._config.part)
        slots = [
            permutation(score.shape[1], self._seed, "rollout/slots", self._plan.position(number, row))
            for row in range(len(prompts))
        ]
        online = isinstance(x, Transition)
        return Round(
            x,
            cond,
            negative,
            score,
            shared,
            torch.stack(slots)[:, : self._plan.slots],
            extra,
            kernel=self._setting.kernel if online else None,
            guidance=self._setting.guidance if online else 1.0,
            grid=self._setting.times,
            taught=self._setting.taught,
        )

    def _advantages(self, number: int, prompts: list[str], score: Tensor) -> Tensor:
        """Return advantages (N, S, K) of this rank, by statistics of all ranks and earlier rounds."""
        names, together, own = self._of_all_ranks(number, prompts, score[:, 0])
        known, before = self._history
        if known != number - 1:
            before = self._store.history(number - 1)
        history = before.add(names, together)
        self._history = (number, history)
        self._store.write_history(number, history)
        found = advantages(together, names, self._config.advantage, history)[own]
        return found[:, None].expand(score.shape).contiguous()

    def _tell(self, number: int, prompts: list[str], scores: Tensor) -> None:
        final = scores[:, -1]
        names = self._judge.rewards if self._config.by == "rewards" else ("people",)
        figures = {f"rollout/{n}": float(final[..., i].mean()) for i, n in enumerate(names)}
        figures["rollout/ties"] = float((final == final[:, :1]).all(1).all(1).float().mean())
        figures["rollout/round"] = float(number)
        self.report.round, self.report.figures = number, figures
        self._store.write_scores(number, prompts, {n: final[..., i] for i, n in enumerate(names)})

    def _settled(self, number: int, start: int, part: Part, judged: list[Future[Tensor]]) -> Part:
        """Wait for a part's scores, save the part and return it."""
        if judged:
            part["scores"] = torch.cat([some.result() for some in judged]).reshape(part["scores"].shape)
        self._store.save(number, start, part)
        return part


def _done(judged: list[Future[Tensor]]) -> bool:
    return all(some.done() for some in judged)


def _as_part(sampled: Sampled) -> Part:
    """Tensors on the CPU, every one with the prompts as its first axis."""
    n = len(sampled.judged)
    x = sampled.x
    part = dict(x._asdict()) if isinstance(x, Transition) else {"x": x}
    for name in ("reference_mean", "drawn_mean"):
        if (means := getattr(sampled, name)) is not None:
            part[name] = means
    part["shared"] = sampled.shared.expand(n, -1)
    part["verdict"] = sampled.verdict.expand(n, -1)
    return {name: value.cpu().contiguous() for name, value in part.items()}


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Dropout off while sampling."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
