"""TIME on a loaded model: pairs of prompts in, changed projections out (Orgad et al. 2023, arXiv 2303.08084).

What the projections of the text get is recorded by hooks while the network runs on both prompts of a pair,
so that any architecture is edited by its real inputs. In cross-attention these depend on the prompt alone and
one call is enough. In joint attention (SD3, FLUX) they depend on the image and its time as well: both prompts
are then asked at the same states of a short sampling of the source prompt, and the sums are means over these
states. All inputs are those of the unedited network.

Several pairs make one least-squares problem, in which the order of the pairs has no effect; the release edits
one pair at a time and restores the weights between. A pair of equal prompts, which goes into no template,
holds what the model makes of that prompt (as Gandikota et al. 2023, arXiv 2308.14761, keep concepts).

What the release does and is kept: sums over all positions, begin, end and padding included; lambda 0.1
whatever the number of tokens; keys as well as values, and the prompt with three prefixes beside itself (both
are flags there, which its README sets). What it cannot do: a word that is replaced, see ``alignment``.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffalign.diffusion.randomness import normal
from diffalign.diffusion.samplers import DDIM, estimates_of
from diffalign.errors import UserError
from diffalign.models.loaded import LoadedModel
from diffalign.models.time_edit.alignment import align
from diffalign.models.time_edit.closed_form import Moments, edited
from diffalign.models.time_edit.projections import Projection, text_projections

TEMPLATES = ("{}", "A photo of {}", "An image of {}", "A picture of {}")
STATES = 6  # of a short sampling, where inputs depend on the image
_SIDE = 64  # pixels of a state where they do not
_AT_ONCE = 4  # pairs in one call of the network, two samples each


@dataclass(frozen=True)
class Pair:
    """An edit: what the source prompt means to the model becomes what the destination prompt meant."""

    source: str
    destination: str

    def __post_init__(self) -> None:
        for name, text in (("from", self.source), ("to", self.destination)):
            if not text.strip():
                raise UserError(f"an edit has an empty prompt ({name}); allowed: text")


@dataclass(frozen=True)
class EditSettings:
    """How an edit is made.

    Attributes:
        strength: lambda, the weight of staying where the model is.
        keys: whether projections to keys are edited beside those to values.
        templates: sentences with one {} for the prompt; each makes a pair of its own.
        states: states of a short sampling at which inputs are recorded where they depend on the image.
        seed: of its noise.
    """

    strength: float = 0.1
    keys: bool = True
    templates: tuple[str, ...] = TEMPLATES
    states: int = STATES
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise UserError(f"lambda={self.strength}; allowed: more than 0")
        if self.states < 1:
            raise UserError(f"states={self.states}; allowed: 1 or more")
        if not self.templates:
            raise UserError("no template; allowed: one or more, {} alone being the prompt itself")
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(f"template {template!r}; allowed: text with one {{}} for the prompt")

    def pairs(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return every pair in every template, each once, those of equal prompts as they are; a leading
        article after text becomes small.
        """
        filled = (
            Pair(*(_filled(template, prompt) for prompt in (pair.source, pair.destination)))
            for pair in pairs
            for template in (self.templates if pair.source != pair.destination else ("{}",))
        )
        return list(dict.fromkeys(filled))


@dataclass(frozen=True)
class Edit:
    """What an edit has changed.

    Attributes:
        before: weights of the edited projections by the names of their parameters, as they were.
        keys: number of edited projections to keys.
        values: number of edited projections to values.
        share: edited parameters over all of the network's.
        change: mean over projections of |W' - W| / |W|.
        matched: by pair, (source token, destination token) of the words that differ.
    """

    before: Mapping[str, Tensor] = field(repr=False)
    keys: int
    values: int
    share: float
    change: float
    matched: tuple[tuple[tuple[str, str], ...], ...]


def edit(
    model: LoadedModel, pairs: Sequence[Pair], settings: EditSettings, size: tuple[int, int] | None = None
) -> Edit:
    """Edit the model's network in place.

    Args:
        model: a model of images whose family says how prompts are laid out (``Family.token_order``).
        pairs: one or more, made one problem.
        settings: how.
        size: (height, width) in pixels of the states; None: small where inputs do not depend on the image,
            else the size that the network was made for.

    Raises:
        UserError: a family or network that cannot be edited, or prompts too long.
    """
    check_editable(model)
    if not pairs:
        raise UserError("no edit; allowed: one or more pairs of prompts")
    network, every = model.network, text_projections(model.network)
    chosen = [p for p in every if settings.keys or p.role == "values"]
    expanded = settings.pairs(pairs)
    brackets = _brackets(model, every, expanded, settings, size)
    before: dict[str, Tensor] = {}
    changes = []
    with torch.no_grad():
        for projection in chosen:
            weight = projection.layer.weight
            before[f"{projection.name}.weight"] = weight.detach().clone()
            after = edited(weight, brackets[projection.name])
            changes.append(float((after - weight).norm() / weight.norm()))
            weight.copy_(after)
    whole = sum(p.numel() for p in network.parameters())
    return Edit(
        before,
        sum(p.role == "keys" for p in chosen),
        sum(p.role == "values" for p in chosen),
        sum(weight.numel() for weight in before.values()) / whole,
        sum(changes) / len(changes),
        tuple(differing(model, pair) for pair in pairs),
    )


def restore(network: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Put weights back, exactly, in place.

    Raises:
        UserError: a name or a shape that the network does not have.
    """
    own = dict(network.named_parameters())
    for name, weight in before.items():
        if name not in own or own[name].shape != weight.shape:
            raise UserError(
                f"the network has no {name} of shape {tuple(weight.shape)}: the record of the edit belongs "
                "to another model"
            )
    with torch.no_grad():
        for name, weight in before.items():
            own[name].copy_(weight)


def check_editable(model: LoadedModel) -> None:
    """Check that the family's prompts can be aligned.

    Raises:
        UserError: a model of videos, or one whose prompts are laid out in a way that is not known here.
    """
    family = model.family
    if model.codec.video or not family.token_order:
        what = "is a model of videos" if model.codec.video else "has no known places of a prompt's tokens"
        raise UserError(
            f"{model.source!r} ({family.name}) {what}, so TIME cannot edit it; allowed: SD1.x, SD2.x, SDXL, "
            "SD3 and FLUX.1"
        )


def differing(model: LoadedModel, pair: Pair) -> tuple[tuple[str, str], ...]:
    """Return (source token, destination token) of the aligned words of a pair that are not the same."""
    tokenizer = getattr(model.pipeline, model.family.token_order[0])
    source, destination = (tokenizer(text).input_ids for text in (pair.source, pair.destination))
    found = align(source, destination, max(len(source), len(destination)))
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in (source, destination)]
    together = ((words[0][i], words[1][found[i]]) for i in range(len(source)))
    return tuple((a.replace("</w>", ""), b.replace("</w>", "")) for a, b in together if a != b)


def _filled(template: str, prompt: str) -> str:
    before, after = template.split("{}")
    if before and prompt.startswith(("A ", "An ", "The ")):
        prompt = prompt[0].lower() + prompt[1:]
    return f"{before}{prompt}{after}"


def _positions(model: LoadedModel, pair: Pair, length: int) -> list[int]:
    """Return the destination position of each position of the text, over all tokenizers in their order."""
    found: list[int] = []
    order = model.family.token_order
    for number, name in enumerate(order):
        tokenizer = getattr(model.pipeline, name)
        last = number == len(order) - 1
        count = length - len(found) if last else int(tokenizer.model_max_length)
        if tokenizer is None:  # the pipeline lacks that encoder: its positions hold zeros
            found += range(len(found), len(found) + count)
            continue
        source, destination = (
            tokenizer(text, truncation=True, max_length=count).input_ids
            for text in (pair.source, pair.destination)
        )
        found += [len(found) + place for place in align(source, destination, count)]
    return found


def _brackets(
    model: LoadedModel,
    projections: Sequence[Projection],
    pairs: Sequence[Pair],
    settings: EditSettings,
    size: tuple[int, int] | None,
) -> dict[str, Tensor]:
    """Return the matrix of ``Moments.bracket`` by projection; projections with one input share one."""
    depends = any("add_" in projection.name.rpartition(".")[2] for projection in projections)
    states = settings.states if depends else 1
    size = size or _size(model, depends)
    moments: dict[str, Moments] = {}
    shared: dict[str, str] = {}
    for start in range(0, len(pairs), _AT_ONCE):
        some = pairs[start : start + _AT_ONCE]
        for inputs in _inputs(model, projections, some, states=states, seed=settings.seed, size=size):
            shared = shared or _shared(inputs)
            for name in dict.fromkeys(shared.values()):
                own = moments.setdefault(name, Moments.empty(inputs[name].shape[-1]))
                sources, destinations = inputs[name].chunk(2)
                for pair, source, destination in zip(some, sources, destinations, strict=True):
                    places = _positions(model, pair, len(source))
                    own.add(source, destination[places], 1 / states)
    brackets = {name: own.bracket(settings.strength) for name, own in moments.items()}
    return {name: brackets[first] for name, first in shared.items()}


def _size(model: LoadedModel, depends: bool) -> tuple[int, int]:
    if depends:
        pipeline = model.pipeline
        side = int(pipeline.default_sample_size) * int(pipeline.vae_scale_factor)
    else:
        side = -(-_SIDE // model.multiple) * model.multiple
    return side, side


def _shared(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each projection the first one that got the very same tensor."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    return {
        name: first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        for name, tensor in inputs.items()
    }


@torch.no_grad()
def _inputs(
    model: LoadedModel,
    projections: Sequence[Projection],
    pairs: Sequence[Pair],
    *,
    states: int,
    seed: int,
    size: tuple[int, int],
) -> Iterator[dict[str, Tensor]]:
    """Yield, for each state, the inputs (2P, L, C) of the projections: of P source prompts and of their
    destinations, at the same images, of ``size`` (height, width), and time.
    """
    denoiser, device, count = model.denoiser(), model.device, len(pairs)
    shape = model.latent_shape(*size)
    area = torch.tensor([size], dtype=torch.float32)
    cond = model.encode_prompts([p.source for p in pairs] + [p.destination for p in pairs])
    sizes = model.micro_conditions(area, torch.zeros(1, 2), area)
    cond |= {name: value.expand(2 * count, *value.shape[1:]) for name, value in sizes.items()}
    cond = {name: value.to(device) for name, value in cond.items()}
    x = normal(torch.Generator().manual_seed(seed), 1, shape).expand(count, *shape).to(device)
    for t, s in itertools.pairwise(model.grid(states, shape)):
        now, then = (torch.full((2 * count,), float(v), device=device) for v in (t, s))
        both = torch.cat([x, x])
        with _recorded(projections) as inputs:
            prediction = denoiser(both, now, cond)
        yield inputs
        clean, noise = (rows[:count] for rows in estimates_of(denoiser, prediction, both, now))
        x = DDIM().after(denoiser.path, clean, noise, now[:count], then[:count])[0]


@contextmanager
def _recorded(projections: Sequence[Projection]) -> Iterator[dict[str, Tensor]]:
    """Fill a mapping with what each projection gets inside the context."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = arguments[0]

        return hook

    handles = [p.layer.register_forward_pre_hook(keep(p.name)) for p in projections]  # type: ignore[arg-type]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
