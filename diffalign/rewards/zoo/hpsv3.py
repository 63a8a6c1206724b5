"""HPSv3 (Ma et al., "HPSv3: Towards Wide-Spectrum Human Preference Score", arXiv 2508.03789).

Qwen2-VL-7B reads the image and an instruction with the prompt. At the added token ``<|Reward|>`` a head of
three linear layers predicts the mean and the spread of a score; the mean is the reward. The published
differentiable path resizes bilinearly without antialiasing. Ours is bicubic with antialiasing, so it equals
the exact path up to 8-bit rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fetched, read_state
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.qwen import IMAGE, Qwen, check_width, linear, load_qwen

_NAME = "hpsv3"
_MARK = "<|Reward|>"
_BASE = "Qwen/Qwen2-VL-7B-Instruct"
_PIXELS = 256 * 28 * 28  # smallest and largest number of pixels of a resized image
_HEAD = {f"rm_head.{layer}.{kind}" for layer in (0, 3, 5) for kind in ("weight", "bias")}


@dataclass(frozen=True)
class HPSv3:
    """A Qwen2-VL, and a head on its hidden state at one token."""

    qwen: Qwen
    head: nn.Module
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; PIL images take the exact path, tensors the differentiable one.

        Raises:
            UserError: an empty prompt, a prompt with a special token of the model, or an image whose aspect
                ratio exceeds 200.
        """
        self.qwen.check(prompts)
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        instruction = template(_NAME)
        texts = [instruction.format(text_prompt=prompt) for prompt in prompts]
        cut = self.qwen.pixels(_PIXELS, _PIXELS).images(images)
        return self.head(self.qwen.read(cut, texts, IMAGE)[:, 0])[:, 0]


def load(source: str | None, place: Place) -> HPSv3:
    """Load HPSv3 from the hub, or from ``source``: FILE or FILE@BASE.

    FILE is a safetensors file in its layout; BASE is the folder or hub id of the Qwen2-VL with its
    architecture and tokenizer.

    Raises:
        UserError: a missing file, the hub cannot be reached, or weights of another model.
    """
    path, _, base = (source or "").partition("@")
    if not path:
        repository, _, filename = REGISTRY[_NAME].checkpoint.rpartition("/")
        path = str(fetched(_NAME, repository, filename))
    state = read_state(_NAME, path)
    head = {key: state.pop(key) for key in list(state) if key.startswith("rm_head.")}
    if set(head) != _HEAD:
        raise UserError(
            f"reward {_NAME!r}: {path!r} has no head of HPSv3's three layers (rm_head.0, rm_head.3, "
            f"rm_head.5); it has {', '.join(sorted(head)) or 'none'}"
        )
    layers = [linear(head[f"rm_head.{i}.weight"], head[f"rm_head.{i}.bias"]) for i in (0, 3, 5)]
    qwen = load_qwen(_NAME, state, path, base or _BASE, [_MARK], place)
    check_width(_NAME, qwen, layers[0], path)
    stack = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    return HPSv3(qwen, stack.to(place.device), place.batch_size)
