"""VideoReward of VideoAlign (Liu et al., "Improving Video Generation with Human Feedback", arXiv 2501.13918).

Qwen2-VL-2B watches the video, two frames a second, and reads an instruction with the prompt; at the added
tokens ``<|VQ_reward|>``, ``<|MQ_reward|>`` and ``<|TA_reward|>`` a linear head says how good looks, motion
and agreement with the prompt are. Each is normalised by the mean and spread in the checkpoint's
model_config.json; their sum is the overall score. As a reward:

* ``video_reward``: the sum; ``video_reward_vq``, ``video_reward_mq``, ``video_reward_ta``: one of the three;
* ``video_reward:FOLDER``: a download of the hub repository, with model_config.json and ``checkpoint-STEP``
  folders, each with ``model.pth``, or with ``adapter_model.safetensors`` and ``non_lora_state_dict.pth``;
* ``video_reward:FOLDER@BASE``: with the Qwen2-VL that it stands on from another place than its config says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.media.videos import Video
from diffalign.rewards.checkpoints import fetched, read_state, unloadable
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.qwen import VIDEO, Qwen, linear, load_qwen, marked_tokenizer, renamed
from diffalign.utils.text import read_json_object

_NAME = "video_reward"
_BASE = "Qwen/Qwen2-VL-2B-Instruct"
_CHECKPOINT = "checkpoint-11352"  # of the published repository
DIMENSIONS = ("VQ", "MQ", "TA")
_MARKS = tuple(f"<|{dimension}_reward|>" for dimension in DIMENSIONS)
_LEAST_PIXELS = 128 * 28 * 28  # of a scaled frame
_LEAST_FRAMES, _MOST_FRAMES, _EVEN = 4, 768, 2
_EMBEDDINGS = "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class VideoAlign:
    """A Qwen2-VL read at three tokens, a head, and what is made of its three numbers.

    Attributes:
        qwen: the network.
        head: of 1 output, taken at each token, or of 3, of which the first token gives the first and so on.
        mean: (3,) of what the head says on its authors' data.
        std: likewise.
        share: (3,), how much each counts in the score.
        fps: frames a second that it looks at.
        largest: pixels of a frame, at most.
        batch_size: videos at once.
    """

    qwen: Qwen
    head: nn.Linear
    mean: Float[Tensor, " 3"]
    std: Float[Tensor, " 3"]
    share: Float[Tensor, " 3"]
    fps: float
    largest: int
    batch_size: int = 16

    def __call__(self, videos: Sequence[Video], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """(B,) float32.

        Raises:
            UserError: an empty prompt or one that holds a token of the format, or a video of a single frame.
        """
        if len(videos) != len(prompts):
            raise ValueError(f"{len(videos)} videos but {len(prompts)} prompts: there must be one each")
        self.qwen.check(prompts)
        size = self.batch_size
        parts = [
            self._score(videos[i : i + size], prompts[i : i + size]) for i in range(0, len(videos), size)
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    @torch.no_grad()
    def dimensions(self, videos: Sequence[Video], prompts: Sequence[str]) -> Float[Tensor, "B 3"]:
        """Visual quality, motion quality and text alignment, normalised."""
        pixels = self.qwen.pixels(_LEAST_PIXELS, self.largest)
        watched = [v.frames[frame_indices(len(v.frames), v.fps, self.fps)] for v in videos]
        cut = pixels.cut([pixels.frames(frames) for frames in watched])
        instruction = template(_NAME)
        texts = [instruction.format(text_prompt=prompt) for prompt in prompts]
        raw = self.head(self.qwen.read(cut, texts, VIDEO))
        raw = raw.diagonal(dim1=1, dim2=2) if raw.shape[2] == len(DIMENSIONS) else raw[..., 0]
        return (raw - self.mean) / self.std

    def _score(self, videos: Sequence[Video], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        return self.dimensions(videos, prompts) @ self.share


def frame_indices(count: int, fps: float, wanted: float) -> list[int]:
    """Which frames of a video are watched: evenly from the first to the last, an even number, at ``wanted``
    frames a second but at least 4 and at most 768 of them, or all.

    Raises:
        UserError: a single frame.
    """
    if count < _EVEN:
        raise UserError(f"reward {_NAME!r}: a video of {count} frames; it must have at least {_EVEN}")
    most = min(_MOST_FRAMES, count) // _EVEN * _EVEN
    number = round(min(max(count / fps * wanted, _LEAST_FRAMES), most) / _EVEN) * _EVEN
    return torch.linspace(0, count - 1, number).round().long().tolist()


def load(source: str | None, place: Place) -> VideoAlign:
    """Return the sum of the three dimensions."""
    return _load(source, place, DIMENSIONS)


def load_visual_quality(source: str | None, place: Place) -> VideoAlign:
    """VQ alone."""
    return _load(source, place, ("VQ",))


def load_motion_quality(source: str | None, place: Place) -> VideoAlign:
    """MQ alone."""
    return _load(source, place, ("MQ",))


def load_text_alignment(source: str | None, place: Place) -> VideoAlign:
    """TA alone."""
    return _load(source, place, ("TA",))


def _load(source: str | None, place: Place, wanted: Sequence[str]) -> VideoAlign:
    folder, _, base = (source or "").partition("@")
    if folder:
        config, checkpoint = _config(Path(folder) / "model_config.json"), _latest(Path(folder))
    else:
        repository = REGISTRY[_NAME].checkpoint
        config = _config(fetched(_NAME, repository, "model_config.json", "FOLDER"))
        checkpoint = fetched(_NAME, repository, f"{_CHECKPOINT}/model.pth", "FOLDER").parent
    base = base or _BASE
    state = _weights(checkpoint, base, _lora_scale(config))
    weight = state.pop("rm_head.weight", None)
    if weight is None or len(weight) not in (1, len(DIMENSIONS)):
        found = "none" if weight is None else f"one of {len(weight)} outputs"
        raise UserError(
            f"reward {_NAME!r}: {str(checkpoint)!r} needs a head (rm_head.weight) of 1 or 3 outputs; it has "
            f"{found}"
        )
    qwen = load_qwen(_NAME, state, str(checkpoint), base, _MARKS, place)
    data, norms = config["data_config"], config.get("inference_config") or {}

    def row(value: Callable[[str], float]) -> Tensor:
        return torch.tensor([float(value(name)) for name in DIMENSIONS], device=place.device)

    return VideoAlign(
        qwen,
        linear(weight).to(place.device),
        mean=row(lambda name: norms.get(f"{name}_mean", 0)),
        std=row(lambda name: norms.get(f"{name}_std", 1)),
        share=row(lambda name: name in wanted),
        fps=float(data["fps"]),
        largest=int(data["max_frame_pixels"]),
        batch_size=place.batch_size,
    )


def _config(path: Path) -> dict[str, Any]:
    """Return the training settings beside a checkpoint; UserError for those of another kind of VideoAlign
    model.
    """
    try:
        config = read_json_object(path)
        found = {
            "prompt_template_type": config["data_config"]["prompt_template_type"],
            "sample_type": config["data_config"].get("sample_type", "uniform"),
            "num_frames": config["data_config"].get("num_frames"),
            "use_special_tokens": config["model_config"]["use_special_tokens"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"reward {_NAME!r}: {str(path)!r} is not there or not VideoAlign's model_config.json "
            f"({type(error).__name__}: {error}); give the folder that holds it"
        ) from error
    known = {
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
        "num_frames": None,
        "use_special_tokens": True,
    }
    for setting, value in known.items():
        if found[setting] != value:
            raise UserError(
                f"reward {_NAME!r}: {str(path)!r} has {setting} {found[setting]!r}; known is {value!r}"
            )
    return config


def _latest(folder: Path) -> Path:
    """Return the ``checkpoint-STEP`` folder with the highest step."""
    found = [(step, path) for path in folder.glob("checkpoint-*") if (step := path.name[11:]).isdigit()]
    if not found:
        raise UserError(f"reward {_NAME!r}: there is no checkpoint-STEP folder in {str(folder)!r}")
    return max(found, key=lambda pair: int(pair[0]))[1]


def _lora_scale(config: Mapping[str, Any]) -> float:
    lora = config.get("peft_lora_config") or {}
    rank, alpha = float(lora.get("lora_r", 1)), float(lora.get("lora_alpha", 0))
    return alpha / (rank**0.5 if lora.get("use_rslora") else rank)


def _weights(checkpoint: Path, base: str, scale: float) -> dict[str, Tensor]:
    """All weights with the LoRA merged, its head included, and as many embeddings as there are tokens."""
    whole = checkpoint / "model.pth"
    if whole.is_file():
        return merged(_named(read_state(_NAME, whole)), scale)
    state = _base_weights(base)
    for file in ("adapter_model.safetensors", "non_lora_state_dict.pth"):
        state |= _named(read_state(_NAME, checkpoint / file))
    tokens = len(marked_tokenizer(_NAME, base, _MARKS))
    state[_EMBEDDINGS] = state[_EMBEDDINGS][:tokens]
    return merged(state, scale)


def _base_weights(base: str) -> dict[str, Tensor]:
    """Return the weights of a plain Qwen2-VL."""
    from transformers import Qwen2VLForConditionalGeneration

    try:
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(base)
    except Exception as error:
        raise unloadable(_NAME, f"the weights of {base!r}", error, "instead") from error
    return renamed(model.state_dict())


def _named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by plain names, without what peft has put around them."""
    return renamed(
        {
            key.removeprefix("base_model.model.")
            .replace(".base_layer.", ".")
            .replace(".default.", "."): tensor
            for key, tensor in state.items()
        }
    )


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale B A, in float32, for the weights W that have a LoRA beside them; the others as they are.

    Raises:
        UserError: a LoRA of a weight that is not there or of another shape.
    """
    result = {key: tensor for key, tensor in state.items() if ".lora_" not in key}
    for key, first in state.items():
        module, lora, _ = key.partition(".lora_A.")
        if not lora:
            continue
        target, second = result.get(f"{module}.weight"), state.get(f"{module}.lora_B.weight")
        if target is None or second is None or target.shape != (len(second), first.shape[1]):
            raise UserError(
                f"reward {_NAME!r}: the adapter has a LoRA of {module}, which the base model has not, or of "
                "another shape; adapter and base must belong together"
            )
        result[f"{module}.weight"] = target.float() + scale * second.float() @ first.float()
    return result
