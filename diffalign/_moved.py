"""Module names of diffalign 0.1: importing one imports the module of today, with a DeprecationWarning."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ROOMS = {
    "config": "config_io:io config_files:files components:build reward_config:reward_schema",
    "diffusion": (
        "paths noising randomness guidance samplers solvers times estimators:likelihood inversion "
        "inversion_steps trajectories:inversion_cache reductions:likelihood"
    ),
    "utils": "files devices across:distributed http_json:http chat_completions out_of_memory:memory",
    "media": "videos evaluation.media:files data.images:images",
    "runs": (
        "job:align material:setup online:rollouts players:roles online_check:online_checks demo "
        "config_check:validate evaluation.watch:validation export.opening:load_pipeline "
        "evaluation.compare:compare reward_training:reward micro_batch"
    ),
    "losses": (
        "losses.labelled:reward_model losses.matching:surrogates losses.of_errors:reference_free "
        "losses.recent:pairwise"
    ),
    "methods": (
        "methods.common:_common methods.steps:_steps methods.likes:_likes methods.matching:_multi_time "
        "methods.trailing:_trailing"
    ),
    "strategies": "strategies.common:_common",
    "plane": "tiny.plane:plane tiny.plane_data:data tiny.plane_online:online training.sources:source",
    "estimate": "models.estimate:estimate models.counting:counting models.shapes:shapes",
    "models": (
        "models.motion:motion_adapter models.way_down:unet_encoder models.adapters:lora "
        "models.checkpointing:gradient_checkpointing models.injection:lora"
    ),
    "models.families": (
        "models.animatediff:animatediff models.cogvideox:cogvideox models.flux:flux models.ltx:ltx "
        "models.pixart:pixart models.sd15:sd15 models.sd3:sd3 models.sdxl:sdxl "
        "models.text_to_video:text_to_video models.wan:wan models.family:base models.registry:registry "
        "models.usual:base"
    ),
    "data.reading": (
        "data.readers:readers data.rows:rows data.tables:tables data.folders:folders data.examples:examples "
        "data.dense:dense data.drop:drop"
    ),
    "data.encoding": (
        "data.encode:encode data.encoded:encoded data.prepare:prepare data.writer:writer data.store:store "
        "data.geometry:geometry data.patches:patches data.rating:rating"
    ),
    "data.batches": "data.source:source data.order:order data.views:views",
    "rewards.zoo": (
        "rewards.aesthetic:aesthetic rewards.aesthetic_siglip:aesthetic_siglip rewards.clip:clip "
        "rewards.clipscore:clipscore rewards.cross_model:cross_model rewards.detectors:detectors "
        "rewards.geneval:geneval rewards.geneval_prompts:geneval_prompts rewards.hps:hps rewards.hpsv3:hpsv3 "
        "rewards.image_reward:image_reward rewards.instructions:instructions rewards.jpeg:jpeg "
        "rewards.latent_reward:latent_reward rewards.mps:mps rewards.ocr:ocr "
        "rewards.open_clip_layout:open_clip_layout rewards.pickscore:pickscore rewards.qwen:qwen "
        "rewards.qwen_pixels:qwen_pixels rewards.step_aware:step_aware rewards.timed_clip:timed_clip "
        "rewards.tiny:tiny rewards.unified_reward:unified_reward rewards.video_reward:video_reward "
        "rewards.vqascore:vqascore"
    ),
    "rewards.scoring": "rewards.items:items rewards.score:score rewards.cache:cache rewards.rater:rater",
    "rewards.serving": "rewards.server:server rewards.remote:remote",
    "rewards": "rewards.of_videos:videos rollout.specs:specs",
    "rollout": "rollout.studio:model",
    "preferences": "pairing:from_scores segment_labels:segments video_pairs:video_takes",
}

MOVED = {
    f"diffalign.{old}": f"diffalign.{room}.{new or old}"
    for room, names in _ROOMS.items()
    for old, _, new in (entry.partition(":") for entry in names.split())
}
"""Former dotted name -> today's."""


class _Alias(Loader):
    """Gives the module of today under its former name."""

    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: ModuleSpec) -> None:
        """Take the default: an empty module, which ``exec_module`` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Replace the empty module by the one of today; the import system returns the replacement."""
        sys.modules[module.__name__] = importlib.import_module(self.target)


def today(former: str) -> str | None:
    """Return today's name of a former module, of submodules of former packages too, else None."""
    package, dot, submodule = former.rpartition(".")
    if former in MOVED:
        return MOVED[former]
    return f"{MOVED[package]}.{submodule}" if dot and package in MOVED else None


class _Finder(MetaPathFinder):
    """Finds former names. It is asked first, since a former package's path would load its modules twice."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a former name, and None for any other."""
        new = today(fullname) if fullname.startswith("diffalign.") else None
        if new is None:
            return None
        warnings.warn(f"{fullname} is {new} now; the former name will go", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Alias(new))


def install() -> None:
    """Make the former names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
