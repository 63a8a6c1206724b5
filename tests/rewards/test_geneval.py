"""GenEval's prompts, its rules on things that are given, and Mask2Former as the detector."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo.clip import load_clip
from diffalign.rewards.zoo.detectors import Detection, Mask2Former, around
from diffalign.rewards.zoo.geneval import ClipColours, GenEval, cut_out, relations
from diffalign.rewards.zoo.geneval_prompts import COLOURS, OBJECTS, Clause, Requirement, read_requirement
from tests.helpers import PUBLISHED_DATA
from tests.rewards import conformance
from tests.rewards.conformance import covers

PUBLISHED = PUBLISHED_DATA / "geneval"
SPELLED = {
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor", "computer mouse": "mouse", "tv remote": "remote",
    "computer keyboard": "keyboard",
}  # fmt: skip
"""COCO's classes as some checkpoints write them."""


# ------------------------------------------------------------------------------------------------ prompts


def as_metadata(requirement: Requirement, prompt: str) -> dict:
    """In the layout of the benchmark's evaluation_metadata.jsonl."""

    def clause(of: Clause) -> dict:
        said = {"class": of.name, "count": of.count}
        said |= {"color": of.colour} if of.colour else {}
        return said | ({"position": list(of.position)} if of.position else {})

    metadata = {"tag": requirement.tag, "include": [clause(c) for c in requirement.include], "prompt": prompt}
    return metadata | ({"exclude": [clause(c) for c in requirement.exclude]} if requirement.exclude else {})


def test_every_published_prompt_says_its_metadata():
    rows = [json.loads(line) for line in (PUBLISHED / "evaluation_metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 553
    for row in rows:
        assert as_metadata(read_requirement(row["prompt"]), row["prompt"]) == row
    assert (PUBLISHED / "object_names.txt").read_text().split("\n")[:80] == list(OBJECTS)


def test_prompts_by_hand():
    assert read_requirement("a photo of an orange orange") == Requirement(
        "colors", (Clause("orange", 1, "orange"),)
    )
    assert read_requirement(" A photo of four skises. ").include == (Clause("skis", 4),)
    position = read_requirement("a photo of a dog right of a teddy bear")
    assert position.include == (Clause("teddy bear"), Clause("dog", position=("right of", 0)))


@pytest.mark.parametrize(
    "prompt",
    ["", "a photo of a unicorn", "a photo of one cow", "a photo of cows", "dog", "a photo of a dog on a cow",
     "a photo of a dog left of a red cow", "a photo of a red dog and a cow"],
)  # fmt: skip
def test_another_prompt_is_refused_before_any_work(prompt):
    reward = GenEval(None, None)
    with pytest.raises(UserError, match=r"cannot read the prompt .*'a photo of three clocks'.*red, orange"):
        reward([Image.new("RGB", (8, 8))] * 2, ["a photo of a cow", prompt])


def test_one_thing_named_twice_is_refused():
    with pytest.raises(UserError, match="names 'dog' twice"):
        read_requirement("a photo of a red dog and a blue dog")


# -------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Sees:
    """A detector that sees what it was made with."""

    things: tuple[Detection, ...]

    def __call__(self, image):
        return list(self.things)


class TopLeft:
    """Colours by the thing's top left pixel."""

    def __call__(self, image, things):
        names = {(255, 0, 0): "red", (0, 0, 255): "blue"}
        return [names.get(image.getpixel((int(t.box[0]), int(t.box[1]))), "white") for t in things]


def thing(label, score=0.95, box=(0, 0, 10, 10)):
    return Detection(label, score, box)


def scores(prompt, *things, image=None):
    """(graded, correct) of one image."""
    image = image or Image.new("RGB", (100, 100))
    both = [
        GenEval(Sees(things), TopLeft(), score)([image], [prompt]).item() for score in ("graded", "correct")
    ]
    return tuple(both)


def painted():
    """White, its left half red."""
    image = Image.new("RGB", (100, 100), "white")
    image.paste((255, 0, 0), (0, 0, 50, 100))
    return image


LEFT, RIGHT = (0, 0, 20, 20), (60, 0, 80, 20)


@pytest.mark.parametrize(
    ("prompt", "things", "expected"),
    [
        ("a photo of a cow", [thing("cow")], (1, 1)),
        ("a photo of a cow", [], (0, 0)),
        ("a photo of a cow", [thing("dog")], (0, 0)),
        ("a photo of a cow", [thing("cow", 0.3)], (0, 0)),  # the threshold itself is not enough
        ("a photo of a cow", [thing("cow"), thing("cow", 0.31)], (0, 1)),  # exactly one, or at least one
        ("a photo of a cow", [thing("cow")] * 4, (-2, 1)),
        ("a photo of a cow", [thing("cow")] * 40, (-14, 1)),  # at most 16 are counted
        ("a photo of a cow and a dog", [thing("cow"), thing("dog")], (1, 1)),
        ("a photo of a cow and a dog", [thing("cow"), thing("cow")], (0, 0)),
        ("a photo of three cows", [thing("cow")] * 3, (1, 1)),
        ("a photo of three cows", [thing("cow")] * 2, (2 / 3, 0)),
        ("a photo of three cows", [thing("cow")] * 4, (2 / 3, 0)),  # excluded
        ("a photo of three cows", [thing("cow")] * 2 + [thing("cow", 0.9)], (2 / 3, 0)),  # counting is strict
    ],
)
def test_counts(prompt, things, expected):
    assert scores(prompt, *things) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "things", "expected"),
    [
        ("a photo of a red cup", [thing("cup", box=LEFT)], (1, 1)),
        ("a photo of a red cup", [thing("cup", box=RIGHT)], (0.5, 0)),
        ("a photo of a red cup", [], (0, 0)),  # no cup, and so no red one
        ("a photo of a red cup", [thing("cup", 0.9, LEFT), thing("cup", 0.8, RIGHT)], (0, 1)),  # the surest
        ("a photo of a red cup", [thing("cup", 0.8, LEFT), thing("cup", 0.9, RIGHT)], (0, 0)),
        ("a photo of a red cup and a white dog", [thing("cup", box=LEFT), thing("dog", box=RIGHT)], (1, 1)),
        ("a photo of a red cup and a blue dog", [thing("cup", box=LEFT), thing("dog", box=RIGHT)], (0.75, 0)),
        ("a photo of a white cup and a red dog", [thing("cup", box=LEFT), thing("dog", box=RIGHT)], (0.5, 0)),
    ],
)
def test_colours(prompt, things, expected):
    assert scores(prompt, *things, image=painted()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "things", "expected"),
    [
        ("a photo of a dog left of a cow", [thing("dog", box=LEFT), thing("cow", box=RIGHT)], (1, 1)),
        ("a photo of a dog right of a cow", [thing("dog", box=LEFT), thing("cow", box=RIGHT)], (2 / 3, 0)),
        ("a photo of a dog left of a cow", [thing("dog", box=LEFT)], (1 / 3, 0)),  # 0, 1, and no target
        ("a photo of a dog left of a cow", [thing("cow", box=RIGHT)], (1 / 3, 0)),  # 1, 0 and 0
        (
            "a photo of a dog left of a cow",
            [thing("dog", 0.9, LEFT), thing("cow", 0.9, RIGHT), thing("cow", 0.8, LEFT)],
            (1 / 3, 1),  # two cows: no target when counts are exact; the surest when not
        ),
    ],
)
def test_positions(prompt, things, expected):
    assert scores(prompt, *things) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}),  # -20 + 2 = -18 of 20
        ((20, 20, 30, 30), (0, 0, 10, 10), {"right of", "below"}),  # 18 of 28.3 each
        ((0, 0, 10, 10), (5, 30, 15, 40), {"above"}),  # x: -3 of 30.4
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),  # 2 is the slack of two boxes of 10
        ((0, 0, 10, 10), (4, 0, 14, 10), set()),  # 2 of 4 is not more than half
        ((0, 0, 10, 10), (5, 0, 15, 10), {"left of"}),  # 3 of 5
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_relations(box, other, expected):
    assert relations(thing("a", box=box), thing("b", box=other)) == expected


@dataclass(frozen=True)
class Bright:
    """Sees the more cows the brighter the image."""

    def __call__(self, image):
        assert image.mode == "RGB"
        return [thing("cow")] * int(np.asarray(image).mean() / 8)


@covers("geneval", "geneval_correct")
def test_it_conforms():
    prompts = ["a photo of a cow", "a photo of three cows"]
    conformance.conforms(GenEval(Bright(), TopLeft()), prompts, tolerance=1e-6, differentiable=False)
    made = lambda size: GenEval(Bright(), TopLeft(), score="correct", batch_size=size)  # noqa: E731
    conformance.conforms_to_samples(made, conformance.pictures(), conformance.some(prompts, 6))


# ----------------------------------------------------------------------------------- colours by a CLIP


def test_cutting_out():
    mask = np.zeros((100, 100), bool)
    mask[10:20, 40:60] = True
    cut = cut_out(painted(), Detection("cup", 1, (40, 5, 60, 25), mask))
    assert cut.size == (20, 20)
    pixels = np.asarray(cut)
    assert (pixels[5:15, :10] == (255, 0, 0)).all() and (pixels[5:15, 10:] == 255).all()
    assert (pixels[:5] == 0x99).all() and (pixels[15:] == 0x99).all()
    assert cut_out(painted(), thing("cup", box=(3.2, 3.4, 3.3, 3.4))).size == (1, 1)


def test_colours_are_those_of_the_nearest_texts(clip_folder):
    clip = load_clip("geneval", str(clip_folder), Place())
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    things = [thing("cup", box=(x, 10, x + 15, 40)) for x in range(0, 60, 6)] + [thing("cow", box=LEFT)]
    expected = []
    for t in things:
        crop = clip.image_embeddings([image.crop(t.box)])[0]
        rests = (f" {t.label}", f"-colored {t.label}", " object")
        texts = {c: clip.text_embeddings([f"a photo of a {c}{rest}" for rest in rests]) for c in COLOURS}
        near = {
            c: torch.nn.functional.cosine_similarity(crop, e.mean(0), dim=0).item() for c, e in texts.items()
        }
        expected.append(max(near, key=near.get))
    namer = ClipColours(clip)
    assert namer(image, things) == expected and namer(image, []) == []


# ------------------------------------------------------------------------------------------ Mask2Former


def make_mask2former(folder, labels, seed=0):
    """Write a random Mask2Former in the hub's layout."""
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=16, dim_feedforward=16, decoder_layers=3, num_attention_heads=2,
        num_queries=6, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config)
        torch.nn.init.normal_(model.class_predictor.weight, std=2)  # sure of itself
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    labels = [SPELLED.get(name, name) for name in OBJECTS]
    return make_mask2former(tmp_path_factory.mktemp("mask2former"), labels)


def test_scores_and_boxes_by_hand():
    """Two queries, two classes and nothing; masks as large as the padded image."""
    masks = torch.full((1, 2, 32, 64), -5.0)
    masks[0, 0, 3:8, 10:20] = 2.0
    masks[0, 1, 20:30, 0:50] = 1.0  # reaches into the padding, which is no part of the image
    classes = torch.tensor([[[0.9, 0.05, 0.05], [0.2, 0.6, 0.2]]]).log()
    asked = []

    def model(pixel_values):
        asked.append(pixel_values)
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)

    model.device = torch.device("cpu")
    detector = Mask2Former(model, ("cow", "dog"), least=0.1, short=30, long=60)
    cow, dog = detector(Image.new("RGB", (40, 30), "white"))
    white = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert asked[0].shape == (1, 3, 32, 64) and not asked[0][:, :, 30:].any() and not asked[0][..., 40:].any()
    assert asked[0][0, :, 0, 0].tolist() == pytest.approx(white)
    assert (
        (cow.label, cow.box) == ("cow", (10, 3, 20, 8))
        and cow.mask.sum() == 50
        and cow.mask.shape == (30, 40)
    )
    assert (dog.label, dog.box) == ("dog", (0, 20, 40, 30))
    assert cow.score == pytest.approx(0.9 / (1 + np.exp(-2)), rel=1e-5)
    assert dog.score == pytest.approx(0.6 / (1 + np.exp(-1)), rel=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "seen"), [(512, 512, (800, 800)), (1024, 512, (667, 1333)), (333, 500, (1201, 800))]
)
def test_sizes_as_mmdetection_scales(width, height, seen):
    assert Mask2Former(None, ()).size(Image.new("RGB", (width, height))) == seen


def test_a_real_network_in_the_published_layout(detector_folder, clip_folder, photos):
    spec = f"geneval:{detector_folder}@{clip_folder}"
    reward = rewards.load(spec)
    small = Mask2Former(reward.detector.model, reward.detector.labels, 0.05, 64, 107)
    assert set(small.labels) == set(OBJECTS)
    found = small(photos[3])  # 31 x 90: scaled by 107 / 90 and padded
    assert found and all(d.mask.shape == (90, 31) and d.box == around(d.mask) for d in found)

    resized = photos[3].convert("RGB").resize((37, 107), Image.Resampling.BILINEAR)
    pixels = (np.asarray(resized) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    padded = np.zeros((128, 64, 3), np.float32)
    padded[:107, :37] = pixels
    with torch.no_grad():
        answer = small.model(pixel_values=torch.from_numpy(padded).permute(2, 0, 1)[None])
    chances = answer.class_queries_logits[0].softmax(-1)[:, :-1]
    logits = torch.nn.functional.interpolate(answer.masks_queries_logits, (128, 64), mode="bilinear")
    logits = torch.nn.functional.interpolate(logits[:, :, :107, :37], (90, 31), mode="bilinear")[0]
    expected = set()
    for value in chances.flatten().topk(6).values:
        query, name = (int(i) for i in (chances == value).nonzero()[0])
        inside = logits[query] > 0
        if inside.any():
            score = value * logits[query].sigmoid()[inside].mean()
            expected |= {(small.labels[name], round(score.item(), 4))} if score > 0.05 else set()
    assert {(d.label, round(d.score, 4)) for d in found} == expected

    prompts = ["a photo of a cow", "a photo of two dogs"]
    alone = [reward([photo], [prompt]) for photo, prompt in zip(photos[:2], prompts, strict=True)]
    assert torch.equal(reward(photos[:2], prompts), torch.cat(alone))
    assert rewards.load(f"geneval_correct:{detector_folder}@{clip_folder}").score == "correct"


def test_other_checkpoints_are_refused(tmp_path, clip_folder, detector_folder):
    few = make_mask2former(tmp_path / "few", ["cat", "dog"])
    for spec, message in [
        (f"geneval:{few}@{clip_folder}", "knows 2 classes, such as cat, dog, but not .*COCO's 80 classes"),
        (
            f"geneval:{clip_folder}@{clip_folder}",
            "is not a whole Mask2Former|cannot load .* as a Mask2Former",
        ),
        (f"geneval:{detector_folder}/config.json", "is a file; a folder or a hub id"),
        (f"geneval_correct:{detector_folder}@{detector_folder}", "'geneval_correct'.*CLIP"),
        ("geneval:nobody/nothing", "cannot load 'nobody/nothing' as a Mask2Former.*connection to the hub"),
    ]:
        with pytest.raises(UserError, match=message):
            rewards.load(spec)
