"""HPSv3++ (Liu et al., "HPSv3++: Scaling Reward Models Across the Full Spectrum of Diffusion Model
Capabilities", arXiv 2606.14657).

Qwen3-VL-8B reads the image and the first half of HPSv3's instruction (visual quality) with the prompt. The
hidden state h at the added token ``<|Reward|>`` gives the capability of the image's generator,

    c = sigmoid(w . (P h + p) + b),

which together with the iteration t of reinforcement learning (0 to 1) scales and shifts h (FiLM), before
HPSv3's head of three layers predicts the mean and the spread of a score; the mean is the reward:

    (gamma, beta) = F(E(c, t)),   score = head(h (1 + gamma) + beta)[0].

The published code pools c over the images of a call, so that a score depends on the other images of the
batch. Here c is of the image alone, as in a published call with one image. Images are resized twice, as
there: to multiples of 28 pixels by the reward's code, then to multiples of 32 by Qwen3-VL's processor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fetched, read_state
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import number, places_and_options
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.qwen import IMAGE, Qwen, check_width, load_qwen, pop_linear
from diffalign.rewards.zoo.qwen_pixels import Pixels

_NAME = "hpsv3pp"
_MARK = "<|Reward|>"
_BASE = "Qwen/Qwen3-VL-8B-Instruct"
_FIRST = Pixels(256 * 28 * 28, 256 * 28 * 28)  # the reward's own resizing
_LEAST, _MOST = 256 * 16 * 16, 16384 * 32 * 32  # pixels within which Qwen3-VL's processor keeps an image
_HALF = (0.5, 0.5, 0.5)
_LAYERS = (
    *(f"rm_head.{i}" for i in (0, 3, 5)),
    *(f"cond_encoder.{i}" for i in (0, 2)),
    *(f"film_gen.{i}" for i in (0, 2)),
    "cap_encoder.proj",
    "cap_encoder.pool_attn",  # weights of a mean over images; of one image it is 1
    "cap_encoder.out_proj",
)


class Head(nn.Module):
    """The layers on the hidden state, in float32.

    Attributes:
        layers: the linear layers by their names in the file, "-" for ".".
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name.replace(".", "-"): layer for name, layer in layers.items()})

    def forward(self, states: Float[Tensor, "B D"], iteration: float) -> Float[Tensor, "B 2"]:
        """Return mean and spread."""
        capability = self._run("cap_encoder-out_proj", self._run("cap_encoder-proj", states)).sigmoid()
        condition = torch.cat([capability, torch.full_like(capability, iteration)], 1)
        embedded = self._run("cond_encoder-2", nn.functional.gelu(self._run("cond_encoder-0", condition)))
        scale, shift = self._run("film_gen-2", self._run("film_gen-0", embedded).relu()).chunk(2, 1)
        x = self._run("rm_head-0", states * (1 + scale) + shift).relu()
        return self._run("rm_head-5", self._run("rm_head-3", x).relu())

    def _run(self, name: str, x: Tensor) -> Tensor:
        found: Tensor = self.layers[name](x)
        return found


@dataclass(frozen=True)
class HPSv3PlusPlus:
    """A Qwen3-VL, and the layers on its hidden state at one token.

    Attributes:
        qwen: the network.
        head: the layers.
        iteration: share of reinforcement learning done, 0 to 1; 0 judges images of a model without it.
        batch_size: images a forward pass.
    """

    qwen: Qwen
    head: Head
    iteration: float = 0.0
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
        instruction = instruction_of_quality()
        texts = [instruction.format(text_prompt=prompt) for prompt in prompts]
        second = replace(self.qwen.pixels(_LEAST, _MOST), mean=_HALF, std=_HALF)
        cut = second.images(_FIRST.resized(images))
        both: Tensor = self.head(self.qwen.read(cut, texts, IMAGE)[:, 0], self.iteration)
        return both[:, 0]


def instruction_of_quality() -> str:
    """Return HPSv3's instruction without its part on text alignment, with which HPSv3++ was trained."""
    whole = template("hpsv3")
    start, end = whole.index("\n**Text Alignment:**"), whole.index("Textual prompt")
    return whole[:start] + whole[end:]


def load(source: str | None, place: Place) -> HPSv3PlusPlus:
    """Load HPSv3++ from the hub, or from ``source``: FILE or FILE@BASE, with the option ``iteration``.

    FILE is a torch or safetensors file in its layout; BASE is the folder or hub id of the Qwen3-VL with its
    architecture and tokenizer.

    Raises:
        UserError: a missing file, the hub cannot be reached, weights of another model, or an ``iteration``
            outside [0, 1].
    """
    (path, base), options = places_and_options(_NAME, source, 2, ["iteration"])
    iteration = number(_NAME, "iteration", options.get("iteration", "0"))
    if not 0 <= iteration <= 1:
        raise UserError(f"reward {_NAME!r}: iteration={iteration:g}; allowed: 0 (no such training) to 1")
    if not path:
        repository, _, filename = REGISTRY[_NAME].checkpoint.rpartition("/")
        path = str(fetched(_NAME, repository, filename))
    state = read_state(_NAME, path)
    lacking = "; it is no HPSv3++ (film_hybrid)"
    layers = {name: pop_linear(_NAME, state, name, path, lacking) for name in _LAYERS}
    qwen = load_qwen(_NAME, state, path, base or _BASE, [_MARK], place, kind="qwen3_vl")
    check_width(_NAME, qwen, layers["rm_head.0"], path)
    head = Head(layers).eval().requires_grad_(False).to(place.device)
    return HPSv3PlusPlus(qwen, head, iteration, place.batch_size)
