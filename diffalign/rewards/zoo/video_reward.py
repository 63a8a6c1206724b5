"""VideoReward of VideoAlign (Liu et al., "Improving Video Generation with Human Feedback", arXiv 2501.13918).

Qwen2-VL-2B reads the video at two frames a second, and an instruction with the prompt. At the added tokens
``<|VQ_reward|>``, ``<|MQ_reward|>`` and ``<|TA_reward|>`` a linear head predicts visual quality, motion
quality and text alignment. Each is standardised by the mean and std in the checkpoint's model_config.json;
their sum is the overall score. Specs:

* ``video_reward``: the sum; ``video_reward_vq``, ``video_reward_mq``, ``video_reward_ta``: one of the three;
* ``video_reward:FOLDER``: a download of the hub repository, with model_config.json and ``checkpoint-STEP``
  folders, each with ``model.pth``, or with ``adapter_model.safetensors`` and ``non_lora_state_dict.pth``;
* ``video_reward:FOLDER@BASE``: with the base Qwen2-VL from a folder or hub id BASE.
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
_CHECKPOINT = "checkpoint-11352"  # the folder in the published repository
DIMENSIONS = ("VQ", "MQ", "TA")
_MARKS = tuple(f"<|{dimension}_reward|>" for dimension in DIMENSIONS)
_LEAST_PIXELS = 128 * 28 * 28  # smallest number of pixels of a resized frame
_LEAST_FRAMES, _MOST_FRAMES, _EVEN = 4, 768, 2
_EMBEDDINGS = "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class VideoAlign:
    """The reward: a Qwen2-VL, a head on its hidden states at three tokens, and a weighted sum.

    Attributes:
        qwen: the network.
        head: linear head with 1 output, applied at each token, or with 3, of which token i gives output i.
        mean: (3,), mean of the head's outputs on its authors' data.
        std: (3,), standard deviation of the head's outputs on its authors' data.
        share: (3,), weight of each dimension in the score.
        fps: frames a second that the network reads.
        largest: largest number of pixels of a resized frame.
        batch_size: videos a forward pass.
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
        """Return scores (B,), float32.

        Raises:
            UserError: an empty prompt, a prompt with a special token, or a video of a single frame.
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
        """Return standardised visual quality, motion quality and text alignment."""
        pixels = self.qwen.pixels(_LEAST_PIXELS, self.largest)
        sampled = [v.frames[frame_indices(len(v.frames), v.fps, self.fps)] for v in videos]
        cut = pixels.cut([pixels.frames(frames) for frames in sampled])
        instruction = template(_NAME)
        texts = [instruction.format(text_prompt=prompt) for prompt in prompts]
        raw = self.head(self.qwen.read(cut, texts, VIDEO))
        raw = raw.diagonal(dim1=1, dim2=2) if raw.shape[2] == len(DIMENSIONS) else raw[..., 0]
        return (raw - self.mean) / self.std

    def _score(self, videos: Sequence[Video], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        return self.dimensions(videos, prompts) @ self.share


def frame_indices(count: int, fps: float, target_fps: float) -> list[int]:
    """Return the indices of the frames that are read: an even number, evenly spaced from first to last.

    Their number follows from ``target_fps`` frames a second, within 4 and 768, and is at most ``count``.

    Raises:
        UserError: the video has a single frame.
    """
    if count < _EVEN:
        raise UserError(f"reward {_NAME!r}: a video of {count} frames; it must have at least {_EVEN}")
    most = min(_MOST_FRAMES, count) // _EVEN * _EVEN
    number = round(min(max(count / fps * target_fps, _LEAST_FRAMES), most) / _EVEN) * _EVEN
    return torch.linspace(0, count - 1, number).round().long().tolist()


def load(source: str | None, place: Place) -> VideoAlign:
    """Load the reward of the sum of the three dimensions."""
    return _load(source, place, DIMENSIONS)


def load_visual_quality(source: str | None, place: Place) -> VideoAlign:
    """Load the reward of visual quality alone."""
    return _load(source, place, ("VQ",))


def load_motion_quality(source: str | None, place: Place) -> VideoAlign:
    """Load the reward of motion quality alone."""
    return _load(source, place, ("MQ",))


def load_text_alignment(source: str | None, place: Place) -> VideoAlign:
    """Load the reward of text alignment alone."""
    return _load(source, place, ("TA",))


def _load(source: str | None, place: Place, dimensions: Sequence[str]) -> VideoAlign:
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
        actual = "none" if weight is None else f"one of {len(weight)} outputs"
        raise UserError(
            f"reward {_NAME!r}: {str(checkpoint)!r} needs a head (rm_head.weight) of 1 or 3 outputs; it has "
            f"{actual}"
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
        share=row(lambda name: name in dimensions),
        fps=float(data["fps"]),
        largest=int(data["max_frame_pixels"]),
        batch_size=place.batch_size,
    )


def _config(path: Path) -> dict[str, Any]:
    """Read the training settings beside a checkpoint.

    Raises:
        UserError: the file is missing or malformed, or a setting differs from the published model's.
    """
    try:
        config = read_json_object(path)
        settings = {
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
    supported = {
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
        "num_frames": None,
        "use_special_tokens": True,
    }
    for name, value in supported.items():
        if settings[name] != value:
            raise UserError(
                f"reward {_NAME!r}: {str(path)!r} has {name} {settings[name]!r}; known is {value!r}"
            )
    return config


def _latest(folder: Path) -> Path:
    """Return the ``checkpoint-STEP`` folder with the highest step."""
    checkpoints = [(step, path) for path in folder.glob("checkpoint-*") if (step := path.name[11:]).isdigit()]
    if not checkpoints:
        raise UserError(f"reward {_NAME!r}: there is no checkpoint-STEP folder in {str(folder)!r}")
    return max(checkpoints, key=lambda pair: int(pair[0]))[1]


def _lora_scale(config: Mapping[str, Any]) -> float:
    lora = config.get("peft_lora_config") or {}
    rank, alpha = float(lora.get("lora_r", 1)), float(lora.get("lora_alpha", 0))
    return alpha / (rank**0.5 if lora.get("use_rslora") else rank)


def _weights(checkpoint: Path, base: str, scale: float) -> dict[str, Tensor]:
    """Return all weights, the head included, with the LoRA merged and embeddings cut to the vocabulary."""
    full = checkpoint / "model.pth"
    if full.is_file():
        return merged(_named(read_state(_NAME, full)), scale)
    state = _base_weights(base)
    for file in ("adapter_model.safetensors", "non_lora_state_dict.pth"):
        state |= _named(read_state(_NAME, checkpoint / file))
    tokens = len(marked_tokenizer(_NAME, base, _MARKS))
    state[_EMBEDDINGS] = state[_EMBEDDINGS][:tokens]
    return merged(state, scale)


def _base_weights(base: str) -> dict[str, Tensor]:
    """Return the weights of the base Qwen2-VL."""
    from transformers import Qwen2VLForConditionalGeneration

    try:
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(base)
    except Exception as error:
        raise unloadable(_NAME, f"the weights of {base!r}", error, "instead") from error
    return renamed(model.state_dict())


def _named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without peft's prefixes and infixes, under Qwen2VLModel's names."""
    return renamed(
        {
            key.removeprefix("base_model.model.")
            .replace(".base_layer.", ".")
            .replace(".default.", "."): tensor
            for key, tensor in state.items()
        }
    )


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge LoRAs into their weights: W + scale B A, in float32; other weights are unchanged.

    Raises:
        UserError: the weight of a LoRA is missing or of another shape.
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
