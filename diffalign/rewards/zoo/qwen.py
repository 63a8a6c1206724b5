"""Qwen-VL models as the backbone of rewards: hidden states at marked tokens of a text with images or videos.

The published rewards on Qwen2-VL and Qwen2.5-VL pass embeddings without positions to the language model,
which then counts tokens from 0 on all three axes. So positions are one-dimensional for these. The forward of
current transformers derives an image's positions from rows and columns, which gives other hidden states and
other scores. The published rewards on Qwen3-VL pass token ids, so their positions are of rows and columns.
Rows of a batch are padded on the right, to which a causal model does not attend, so a row's result does not
depend on the batch.

Both published weight layouts load: `visual.*` and `model.layers.*` of transformers before 4.52,
`model.visual.*` and `model.language_model.*` since.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fill, unloadable
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo.instructions import refuse_unreadable, reserved
from diffalign.rewards.zoo.qwen_pixels import Cut, Pixels

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
# the chat template for one user message, up to the start of the answer
_CHAT = "<|im_start|>user\n{places}{text}<|im_end|>\n<|im_start|>assistant\n"
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@dataclass(frozen=True)
class Kind:
    """A generation of the model.

    Attributes:
        title: its name, for messages.
        model: transformers' class of the model without its head over the vocabulary.
        system: what the chat template writes before the user's message.
        flat: whether the published rewards number tokens on one axis.
    """

    title: str
    model: str
    system: str = ""
    flat: bool = False


KINDS = {
    "qwen2_vl": Kind("Qwen2-VL", "Qwen2VLModel", _SYSTEM, flat=True),
    "qwen2_5_vl": Kind("Qwen2.5-VL", "Qwen2_5_VLModel", _SYSTEM, flat=True),
    "qwen3_vl": Kind("Qwen3-VL", "Qwen3VLModel"),
}


@dataclass(frozen=True)
class Qwen:
    """A frozen Qwen-VL without its head over the vocabulary, and its tokenizer.

    Attributes:
        name: the reward's name, for messages.
        model: transformers' model, of a class in KINDS.
        tokenizer: its tokenizer, with the reward's added tokens.
        marks: ids of the tokens whose hidden states are returned, in their order in the text.
        chat: the text up to the start of the answer, with {places} for the images and {text} for the rest of
            the user's message; empty: the model's own.
    """

    name: str
    model: Any
    tokenizer: Any
    marks: tuple[int, ...]
    chat: str = ""

    @property
    def kind(self) -> Kind:
        """The generation of the model."""
        return KINDS[self.model.config.model_type]

    def pixels(self, smallest: int, largest: int) -> Pixels:
        """Return the pre-processing for this vision tower; ``smallest`` and ``largest`` are in pixels."""
        tower = self.model.config.vision_config
        return Pixels(
            smallest, largest, tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size
        )

    def check(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for an empty prompt, or one that holds a special token of the model."""
        refuse_unreadable(self.name, prompts, reserved(self.tokenizer))

    def read(self, cut: Cut, texts: Sequence[str], place: str) -> Float[Tensor, "B K D"]:
        """Return the last hidden states, float32, at the K marks of each row; differentiable in the patches.

        Args:
            cut: patches of B images or videos, or of as many for each row, row by row.
            texts: B user messages that follow the images; each holds every mark once, in order.
            place: the placeholder token, IMAGE or VIDEO; a VIDEO only where positions are flat.
        """
        ids, is_visual = self._tokens(cut, texts, place)
        states = self._flat(cut, ids, is_visual) if self.kind.flat else self._spatial(cut, ids, is_visual)
        at = self._marked(ids)
        marked: Tensor = states[torch.arange(len(ids), device=ids.device)[:, None], at]
        return marked.float()

    def _spatial(
        self, cut: Cut, ids: Int[Tensor, "B L"], is_image: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L D"]:
        """Return the hidden states with positions of rows and columns."""
        model = self.model
        states: Tensor = model(
            input_ids=ids,
            mm_token_type_ids=is_image.int(),
            pixel_values=cut.patches.to(model.device, model.dtype),
            image_grid_thw=cut.grids.to(model.device),
        ).last_hidden_state
        return states

    def _flat(
        self, cut: Cut, ids: Int[Tensor, "B L"], is_visual: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L D"]:
        """Return the hidden states with positions on one axis."""
        model = self.model
        embedded = model.get_input_embeddings()(ids)
        visual = model.visual(cut.patches.to(model.device, model.dtype), grid_thw=cut.grids.to(model.device))
        embedded = embedded.masked_scatter(is_visual[..., None], visual.pooler_output.to(embedded.dtype))
        positions = torch.arange(ids.shape[1], device=ids.device).view(1, 1, -1).expand(3, len(ids), -1)
        found = model.language_model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
        states: Tensor = found.last_hidden_state
        return states

    def _tokens(
        self, cut: Cut, texts: Sequence[str], place: str
    ) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Return token ids, padded on the right, and a mask of the images' tokens."""
        counts = cut.grids.prod(1) // self.model.config.vision_config.spatial_merge_size**2
        chat = self.chat or self.kind.system + _CHAT
        rows = []
        for row, text in zip(counts.view(len(texts), -1).tolist(), texts, strict=True):
            places = "".join(f"<|vision_start|>{place * count}<|vision_end|>" for count in row)
            whole = chat.replace("{places}", places).replace("{text}", text)
            rows.append(self.tokenizer(whole, add_special_tokens=False).input_ids)
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id or 0)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        ids = ids.to(self.model.device)
        return ids, ids == self.tokenizer.convert_tokens_to_ids(place)

    def _marked(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, "B K"]:
        """Return the positions of the marks in each row."""
        marks = torch.tensor(self.marks, device=ids.device)
        is_mark = torch.isin(ids, marks)
        once = (is_mark.sum(1) == len(marks)).all() and torch.equal(ids[is_mark], marks.repeat(len(ids)))
        assert once, f"reward {self.name!r}: its marks are not in the text once each and in order"
        return is_mark.nonzero()[:, 1].view(len(ids), len(marks))


def load_qwen(
    name: str,
    state: Mapping[str, Tensor],
    source: str,
    base: str,
    marks: Sequence[str],
    place: Place,
    *,
    kind: str = "qwen2_vl",
) -> Qwen:
    """Return a Qwen-VL with the given weights.

    Args:
        name: the reward's name, for messages.
        state: weights in either published layout, without the reward's head.
        source: file or hub id of the weights, for messages.
        base: folder or hub id with config.json and tokenizer.
        marks: tokens that the reward adds to the vocabulary, in order.
        place: device and dtype.
        kind: the model type that ``base`` must have; one of KINDS.

    Raises:
        UserError: no such model at ``base``, the hub cannot be reached, or weights of another model.
    """
    config = _config(name, base, kind)
    tokenizer = marked_tokenizer(name, base, marks)
    named = renamed(state)
    embeddings = named.get("language_model.embed_tokens.weight")
    if embeddings is not None and len(embeddings) != len(tokenizer):
        raise UserError(
            f"reward {name!r}: {source!r} has embeddings of {len(embeddings)} tokens, but the tokenizer of "
            f"{base!r} has {len(tokenizer)} with {', '.join(marks)}; they must belong together"
        )
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.use_cache = False
    model = _filled(name, config, named, source, place)
    return Qwen(name, model, tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(marks))))


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of either layout to the names of the models in KINDS; ``lm_head`` is dropped."""
    prefixes = {
        "model.visual.": "visual.",
        "model.language_model.": "language_model.",
        "model.": "language_model.",
    }
    named = {}
    for key, tensor in state.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        if not key.startswith("lm_head."):
            named[prefixes.get(old, "") + key.removeprefix(old)] = tensor
    return named


def marked_tokenizer(name: str, base: str, marks: Sequence[str]) -> Any:
    """Load the tokenizer of a folder or hub id and append a reward's own tokens.

    Raises:
        UserError: there is no tokenizer, or the hub cannot be reached.
    """
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # hub, file and format errors, of many types
        raise unloadable(name, f"a tokenizer of {base!r}", error, "instead") from error
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], True)
    return tokenizer


def _config(name: str, base: str, kind: str) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base)
    except Exception as error:
        raise unloadable(name, f"the config.json of {base!r}", error, "instead") from error
    if config.model_type != kind:
        raise UserError(
            f"reward {name!r}: {base!r} is a {config.model_type}; needed is a {KINDS[kind].title} "
            f"(model_type {kind})"
        )
    return config


def _filled(name: str, config: Any, state: Mapping[str, Tensor], source: str, place: Place) -> Any:
    """Return a frozen model with these weights; the meta device avoids allocating them twice."""
    import transformers

    with torch.device("meta"):
        model: Any = getattr(transformers, KINDS[config.model_type].model)(config)
    dtype = getattr(torch, place.dtype)
    fill(name, model, {key: tensor.to(dtype) for key, tensor in state.items()}, source)
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # rotary frequencies: no checkpoint holds them, and they stay float32
            model.set_submodule(path, type(module)(module.config))
    return model.to(place.device).eval().requires_grad_(False)


def pop_linear(name: str, state: dict[str, Tensor], layer: str, path: str, lacking: str) -> nn.Linear:
    """Take the weights of a linear layer out of ``state`` and return the layer, frozen, in float32.

    Args:
        name: the reward's name, for messages.
        state: weights by name.
        layer: name of the layer.
        path: file of the weights, for messages.
        lacking: end of the message if there is no such layer.

    Raises:
        UserError: there is no such layer with a bias.
    """
    weight, bias = state.pop(f"{layer}.weight", None), state.pop(f"{layer}.bias", None)
    if weight is None or bias is None:
        raise UserError(f"reward {name!r}: {path!r} has no layer {layer}{lacking}")
    return linear(weight, bias)


def check_width(name: str, qwen: Qwen, layer: nn.Linear, path: str, *, several: bool = False) -> None:
    """Raise a UserError if the first layer of a head, or of several, does not take what ``qwen`` makes."""
    width = qwen.model.config.text_config.hidden_size
    if layer.in_features != width:
        whose = f"heads of {path!r} take" if several else f"head of {path!r} takes"
        raise UserError(
            f"reward {name!r}: the {whose} {layer.in_features} numbers, but its language model makes {width}"
        )


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a frozen linear layer in float32."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
    return layer.eval().requires_grad_(False)
