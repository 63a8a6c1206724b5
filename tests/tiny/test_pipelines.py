"""The shipped weights: genuine pipelines, pairs in Pick-a-Pic's schema and a CLIP that knows right from
wrong.
"""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffalign import tiny
from diffalign.tiny import WEIGHTS
from diffalign.tiny.judge import judge, taste
from diffalign.tiny.scenes import alter, caption, render, sample_scene, split_of
from diffalign.tiny.worlds import SCENES, WORLDS
from diffalign.tiny_build.saving import forget_paths

PIPELINES = {
    "sdxl": StableDiffusionXLPipeline,
    "sd15": StableDiffusionPipeline,
    "sdxl64": StableDiffusionXLPipeline,
}


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_loads_in_plain_diffusers_and_draws_what_it_is_told(family):
    pipe = PIPELINES[family].from_pretrained(tiny.pipeline_path(family))
    pipe.set_progress_bar_config(disable=True)
    world = WORLDS[family]
    prompts = list(world.split_captions("validation")[:24])
    images = pipe(
        prompts,
        num_inference_steps=12,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (24, world.side, world.side, 3)
    own = np.mean([world.judge(i, p) for i, p in zip(images, prompts, strict=True)])
    other = np.mean([world.judge(i, p) for i, p in zip(images, prompts[1:] + prompts[:1], strict=True)])
    assert own > other + 0.05
    assert 0 <= np.mean([world.taste(i) for i in images]) <= 1


@pytest.mark.parametrize(
    "folder",
    [
        "sdxl/tokenizer",
        "sdxl/tokenizer_2",
        "sd15/tokenizer",
        "clip",
        "sdxl64/tokenizer",
        "sdxl64/tokenizer_2",
    ],
)
def test_tokenizers_keep_captions_and_survive_other_text(folder):
    for kind in (CLIPTokenizer, AutoTokenizer):
        tokenizer = kind.from_pretrained(tiny.WEIGHTS / folder)
        assert tokenizer.model_max_length == 32
        text = WORLDS.get(folder.partition("/")[0], SCENES).split_captions("test")[0]
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert len(ids) == len(text.split()) + 2  # one token a word, start and end
        assert tokenizer("Zebra!", padding="max_length", truncation=True).input_ids[0] == ids[0]


def test_pairs_have_the_schema_and_the_right_winner():
    table = pq.read_table(tiny.pairs_path())
    columns = {
        "caption",
        "jpg_0",
        "jpg_1",
        "label_0",
        "label_1",
        "has_label",
        "are_different",
        "best_image_uid",
    }
    assert columns <= set(table.column_names)
    rows = table.slice(0, 300).to_pylist()
    assert {split_of(t) for t in table["caption"].to_pylist()} == {"train"}
    places, tastes = [], []
    for row in rows:
        images = [Image.open(io.BytesIO(row[k])) for k in ("jpg_0", "jpg_1")]
        scores = [judge(i, row["caption"]) for i in images]
        gap = row["label_0"] - row["label_1"]
        assert row["label_0"] + row["label_1"] == 1
        assert np.sign(scores[0] - scores[1]) in (np.sign(gap), 0)
        places.append(gap)
        tastes.append(gap * (taste(images[0]) - taste(images[1])))
    assert abs(np.mean(places)) < 0.2  # the winner's place says nothing, nor does the style
    assert abs(np.mean(tastes)) < 0.05


def test_the_clip_ranks_the_right_picture_first():
    model = CLIPModel.from_pretrained(tiny.clip_path())
    tokenizer = CLIPTokenizer.from_pretrained(tiny.clip_path())
    processor = CLIPImageProcessor.from_pretrained(tiny.clip_path())
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(100)]
    texts = tokenizer([caption(s) for s in scenes], padding=True, return_tensors="pt")
    images = [render(s) for s in scenes] + [render(alter(s, rng)) for s in scenes]
    with torch.no_grad():
        scores = model(**texts, **processor(images=images, return_tensors="pt")).logits_per_text
    right, wrong = scores[:, :100].diagonal(), scores[:, 100:].diagonal()
    assert (right > wrong).float().mean() > 0.8


def test_package_data_stays_small():
    files = [p for p in tiny.WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24e6
    assert not [p for p in files if p.suffix in {".bin", ".pt", ".pkl"}]


def test_no_part_says_where_it_was_made():
    for file in WEIGHTS.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file


def test_saving_forgets_where_a_pipeline_came_from(tmp_path):
    for name in ("model_index.json", "unet/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"_name_or_path": "/somewhere", "kept": 1}')
    forget_paths(tmp_path)
    for name in ("model_index.json", "unet/config.json"):
        assert json.loads((tmp_path / name).read_text()) == {"kept": 1}
