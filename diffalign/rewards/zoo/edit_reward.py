"""EditReward (Wu et al., "EditReward: A Human-Aligned Reward Model for Instruction-Guided Image Editing",
arXiv 2509.26346).

A Qwen2.5-VL reads the source image, the edited one and an instruction with the prompt, twice: once about how
the prompt was followed, once about the quality of the edit. At the added token ``<|Reward|>`` a head of
three linear layers, one for each question, predicts the mean and the spread of a score; the reward is the
mean of both means. As in HPSv3, on whose code the published one is built, images are resized to about
448 x 448 pixels and positions count tokens. The chat template is the base's own, since the published weights
are of two bases (``TIGER-Lab/EditReward-Qwen2.5-VL-7B``, ``TIGER-Lab/EditReward-MiMo-VL-7B-SFT-2508``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt
from diffalign.rewards.checkpoints import fetched, is_hub_id, read_state
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import places_and_options
from diffalign.rewards.zoo.edits import edits_of
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.qwen import IMAGE, Qwen, check_width, load_qwen, pop_linear
from diffalign.rewards.zoo.qwen_pixels import interleaved

_NAME = "edit_reward"
_MARK = "<|Reward|>"
_BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
_FILES = ("model.safetensors", "model.pth")
_PIXELS = 256 * 28 * 28  # smallest and largest number of pixels of a resized image
_QUESTIONS = ("following", "quality")  # of head_0 and head_1
_LAYERS = (0, 3, 5)


@dataclass(frozen=True)
class EditReward:
    """A Qwen2.5-VL, and a head for each question on its hidden state at one token."""

    qwen: Qwen
    heads: nn.ModuleList
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; PIL images take the exact path, tensors the differentiable one.

        Raises:
            UserError: a prompt without a source image, an empty prompt, a prompt with a special token of the
                model, or an image whose aspect ratio exceeds 200.
        """
        self.check_prompts(prompts)
        return in_batches(self._score, images, edits_of(_NAME, prompts), self.batch_size)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts that cannot be scored: see ``__call__``."""
        self.qwen.check(prompts)
        edits_of(_NAME, prompts)

    def _score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        pixels = self.qwen.pixels(_PIXELS, _PIXELS)
        sources = [prompt.image for prompt in prompts if isinstance(prompt, SourcedPrompt)]
        cut = interleaved([pixels.images(sources), pixels.images(images)])
        means = []
        for question, head in zip(_QUESTIONS, self.heads, strict=True):
            instruction = template(f"{_NAME}_{question}")
            texts = [instruction.format(text_prompt=prompt) for prompt in prompts]
            means.append(head(self.qwen.read(cut, texts, IMAGE)[:, 0])[:, 0])
        return torch.stack(means).mean(0)


def load(source: str | None, place: Place) -> EditReward:
    """Load EditReward from the hub, or from ``source``: WEIGHTS or WEIGHTS@BASE.

    WEIGHTS is a file in its layout, or a folder or hub id with it (model.safetensors, model.pth); BASE is the
    folder or hub id of its Qwen2.5-VL, with the architecture, the tokenizer and the chat template.

    Raises:
        UserError: a missing file, the hub cannot be reached, or weights of another model.
    """
    (where, base), _ = places_and_options(_NAME, source, 2, ())
    path = str(_file(where or REGISTRY[_NAME].checkpoint))
    state = read_state(_NAME, path)
    names = [f"rm_heads.head_{i}.{layer}" for i in range(len(_QUESTIONS)) for layer in _LAYERS]
    lacking = " of a head; it is no EditReward"
    layers = [pop_linear(_NAME, state, name, path, lacking) for name in names]
    qwen = load_qwen(_NAME, state, path, base or _BASE, [_MARK], place, kind="qwen2_5_vl")
    check_width(_NAME, qwen, layers[0], path, several=True)
    heads = [
        nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        for first, second, third in (layers[:3], layers[3:])
    ]
    qwen = replace(qwen, chat=_chat(qwen.tokenizer, base or _BASE))
    return EditReward(qwen, nn.ModuleList(heads).to(place.device), place.batch_size)


def _file(where: str) -> Path:
    """Return the file of weights of a file, folder or hub id."""
    if is_hub_id(where):
        return fetched(_NAME, where, _FILES[0])
    path = Path(where)
    found = [path / name for name in _FILES if (path / name).is_file()] if path.is_dir() else [path]
    if not found:
        raise UserError(f"reward {_NAME!r}: the folder {where!r} has none of {', '.join(_FILES)}")
    return found[0]


def _chat(tokenizer: Any, base: str) -> str:
    """Return the base's chat template of two images and a text, for ``Qwen.chat``; empty if it has none."""
    if not tokenizer.chat_template:
        return ""
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "{text}"}]
    chat: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    places = f"<|vision_start|>{IMAGE}<|vision_end|>" * 2
    if chat.count(places) != 1 or chat.count("{text}") != 1:
        raise UserError(
            f"reward {_NAME!r}: the chat template of {base!r} does not write two images and a text as "
            f"Qwen2.5-VL's does, but {chat[:200]!r}"
        )
    return chat.replace(places, "{places}")
