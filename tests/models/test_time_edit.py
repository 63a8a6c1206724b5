"""TIME: the closed form against golden vectors and numpy's least squares, alignment, real networks, undo."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign.cli import main
from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.errors import UserError
from diffalign.export.time_edits import Edited, read_edits, save_edited, undo
from diffalign.models.loading import load
from diffalign.models.lora import add_lora
from diffalign.models.time_edit.alignment import align
from diffalign.models.time_edit.closed_form import Moments, edited
from diffalign.models.time_edit.edit import EditSettings, Pair, differing, edit, restore
from diffalign.models.time_edit.projections import shared_blocks, text_projections
from diffalign.runs.time_edit import meaning, own_prompts, read_pairs, sort_prompts
from tests.helpers import VECTORS

GOLDEN, ALIGNED = np.load(VECTORS / "time_edit.npz"), np.load(VECTORS / "time_align.npz")
PAIR = Pair("a red dog", "a blue dog")
ONE = EditSettings(templates=("{}",), states=1)


def by_lstsq(weight, source, destination, strength):
    """Return the edited weight by numpy: |c W'^T - c* W^T|^2 + lambda |W' - W|^2 as one stacked problem."""
    rows = np.concatenate([source, np.sqrt(strength) * np.eye(weight.shape[1])])
    goals = np.concatenate([destination @ weight.T, np.sqrt(strength) * weight.T])
    return np.linalg.lstsq(rows, goals, rcond=None)[0].T


def bracket(source, destination, strength):
    moments = Moments.empty(source.shape[-1])
    moments.add(torch.as_tensor(source), torch.as_tensor(destination))
    return moments.bracket(strength)


@pytest.mark.parametrize("case", ["a1_a", "a2_a"])
def test_the_closed_form_of_the_release(case):
    at = lambda key: GOLDEN[f"{case}_{key}"]  # noqa: E731
    weight = torch.from_numpy(at("W"))
    after = edited(weight, bracket(at("k_old"), at("k_new"), float(at("lambda"))))
    np.testing.assert_allclose(after.numpy(), at("W_new"), rtol=0, atol=1e-10)


def test_the_closed_form_is_the_least_squares_solution():
    random = np.random.default_rng(0)
    weight, source, destination = (random.normal(size=shape) for shape in ((4, 7), (20, 7), (20, 7)))
    after = edited(torch.from_numpy(weight), bracket(source, destination, 0.3)).numpy()
    np.testing.assert_allclose(after, by_lstsq(weight, source, destination, 0.3), rtol=1e-9)


def test_limits_of_the_closed_form():
    random = np.random.default_rng(1)
    weight, source, destination = (random.normal(size=shape) for shape in ((4, 9), (5, 9), (5, 9)))
    tensor = torch.from_numpy(weight)
    assert torch.equal(edited(tensor, bracket(source, source, 0.1)), tensor)
    np.testing.assert_allclose(edited(tensor, bracket(source, destination, 1e12)), weight, atol=1e-9)
    exact = edited(tensor, bracket(source, destination, 1e-9)).numpy()
    np.testing.assert_allclose(source @ exact.T, destination @ weight.T, atol=1e-6)
    twice = bracket(np.concatenate([source] * 2), np.concatenate([destination] * 2), 0.2)
    torch.testing.assert_close(twice, bracket(source, destination, 0.1))
    with pytest.raises(UserError, match="lambda=0"):
        bracket(source, destination, 0)


@pytest.mark.parametrize("case", ["a1_a", "a2_a"])
def test_the_alignment_of_the_release(case):
    old, new, expected = (ALIGNED[f"{case}_{key}"].tolist() for key in ("tokens_old", "tokens_new", "idx"))
    assert align(old, new, 77) == expected


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ([1, 5, 6, 2], [1, 7, 6, 2], [0, 1, 2, 3, 4, 5]),  # a word for another
        ([1, 5, 6, 2], [1, 7, 8, 6, 2], [0, 1, 3, 4, 5, 5]),  # one for two: the first of them
        ([1, 5, 9, 6, 2], [1, 7, 6, 2], [0, 1, 1, 2, 3, 4]),  # two for one
        ([1, 5, 6, 2], [1, 6, 2], [0, 1, 1, 2, 3, 4]),  # one left out: the next anchor
        ([1, 5, 5, 2], [1, 5, 8, 5, 2], [0, 1, 3, 4, 5, 5]),  # repeated: left to right
    ],
)
def test_words_that_are_replaced_or_left_out(source, destination, expected):
    assert align(source, destination, 6) == expected


def test_prompts_that_are_too_long():
    with pytest.raises(UserError, match="destination prompt has 4 tokens; allowed: 1 to 3"):
        align([1, 2], [1, 2, 3, 4], 3)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_cross_attention_is_edited_by_the_embeddings_of_the_text(folders, family):
    model = load(ModelConfig(str(folders[family])))
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    done = edit(model, [PAIR], ONE)
    after = dict(model.network.named_parameters())
    expected = {n for n in before if ".attn2.to_k." in n or ".attn2.to_v." in n}
    assert {n for n in before if not torch.equal(before[n], after[n])} == expected == set(done.before)
    states = model.encode_prompts([PAIR.source, PAIR.destination])["encoder_hidden_states"]
    ids = [model.pipeline.tokenizer(text).input_ids for text in (PAIR.source, PAIR.destination)]
    source, destination = (rows.double().numpy() for rows in states)
    destination = destination[align(*ids, len(source))]
    for name in expected:
        wanted = by_lstsq(before[name].double().numpy(), source, destination, 0.1)
        np.testing.assert_allclose(after[name].detach().numpy(), wanted, rtol=1e-3, atol=1e-5)
    restore(model.network, done.before)
    assert all(torch.equal(before[n], p) for n, p in model.network.named_parameters())
    assert done.keys == done.values == len(expected) // 2 and 0 < done.share < 1


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_attention_is_edited_by_what_its_projections_get(folders, family):
    model = load(ModelConfig(str(folders[family])))
    first = next(p for p in text_projections(model.network) if p.role == "values")
    weight, seen = first.layer.weight.detach().clone(), []
    handle = first.layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    done = edit(model, [PAIR], ONE)
    handle.remove()
    assert all(name.split(".")[-2] in ("add_k_proj", "add_v_proj") for name in done.before)
    source, destination = seen[0].double().numpy()
    names = model.family.token_order
    places, start = [], 0
    for number, name in enumerate(names):
        tokenizer = getattr(model.pipeline, name)
        length = len(source) - start if number + 1 == len(names) else tokenizer.model_max_length
        own = range(length)
        if tokenizer is not None:
            own = align(*(tokenizer(t).input_ids for t in (PAIR.source, PAIR.destination)), length)
        places += [start + place for place in own]
        start += length
    wanted = by_lstsq(weight.double().numpy(), source, destination[places], 0.1)
    np.testing.assert_allclose(first.layer.weight.detach().numpy(), wanted, rtol=1e-3, atol=1e-5)
    assert (shared_blocks(model.network) > 0) == (family == "flux")


def test_values_alone_several_edits_and_the_words_that_differ(folders):
    model = load(ModelConfig(str(folders["sd15"])))
    pairs = [PAIR, Pair("a cat", "a big cat")]
    done = edit(model, pairs, EditSettings(keys=False, states=1))
    assert done.keys == 0 and all(".to_v." in name for name in done.before)
    changed = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    restore(model.network, done.before)
    edit(model, pairs[::-1], EditSettings(keys=False, states=1))
    for name, value in model.network.named_parameters():
        torch.testing.assert_close(value, changed[name], rtol=1e-4, atol=1e-6)
    assert any("b" in b for _, b in differing(model, PAIR)) and differing(model, Pair("a", "a")) == ()
    filled = EditSettings(templates=("{}", "A photo of {}")).pairs([Pair("A dog", "a cat")])
    assert [p.source for p in filled] == ["A dog", "A photo of a dog"]
    held = Pair("a sea", "a sea")
    assert EditSettings().pairs([held]) == [held]


def test_equal_prompts_change_nothing(folders):
    model = load(ModelConfig(str(folders["sd15"])))
    done = edit(model, [Pair("a dog", "a dog")], ONE)
    assert done.change < 1e-6 and done.matched == ((),)


def test_models_that_cannot_be_edited(folders):
    pixart = load(ModelConfig(str(folders["pixart"])))
    with pytest.raises(UserError, match=r"pixart\) has no known places of a prompt's tokens"):
        edit(pixart, [PAIR], ONE)
    adapted = load(ModelConfig(str(folders["sd15"])))
    add_lora(adapted.network, LoraConfig(rank=2, targets=("to_k",)))
    with pytest.raises(UserError, match="carries a LoRA"):
        edit(adapted, [PAIR], ONE)
    with pytest.raises(UserError, match="the record of the edit belongs to another model"):
        restore(adapted.network, {"nowhere.weight": torch.zeros(1)})
    for values, words in (
        ({"strength": 0.0}, "lambda=0"),
        ({"templates": ("no place",)}, "template 'no place'"),
        ({"templates": ()}, "no template"),
        ({"states": 0}, "states=0"),
    ):
        with pytest.raises(UserError, match=words):
            EditSettings(**values)
    with pytest.raises(UserError, match="empty prompt"):
        Pair("a dog", " ")


def test_edits_are_undone_one_by_one_to_the_bit(folders, tmp_path):
    model = load(ModelConfig(str(folders["sd15"])))
    original = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    first = Edited({"number": 1}, edit(model, [PAIR], ONE).before)
    once = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    second = Edited({"number": 2}, edit(model, [Pair("a dog", "a cat")], ONE).before)
    save_edited(model, [first, second], tmp_path / "edited")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "edited", safety_checker=None)
    for name, p in plain.unet.named_parameters():
        assert torch.equal(p, dict(model.network.named_parameters())[name])
    again = load(ModelConfig(str(tmp_path / "edited")))
    edits = read_edits(tmp_path / "edited")
    with pytest.raises(UserError, match="records 2 edits"):
        undo(again, edits, 3)
    left = undo(again, edits, 1)
    assert [dict(e.facts) for e in left] == [{"number": 1}]
    assert all(torch.equal(p, once[name]) for name, p in again.network.named_parameters())
    assert undo(again, left, 1) == []
    assert all(torch.equal(p, original[name]) for name, p in again.network.named_parameters())


def test_the_command_edits_draws_and_undoes(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, edited_folder = str(folders["sd15"]), tmp_path / "edited"
    (tmp_path / "prompts.txt").write_text("a red dog\na red house\nthe sea\n")
    (tmp_path / "more.csv").write_text("from,to\na cat,a big cat\n")
    drawn = ["--prompts", "prompts.txt", "--rewards", "jpeg", "--steps", "1", "--height", "16"]
    drawn += ["--width", "16", "--guidance", "1"]
    words = ["edit", model, "--from", "a red dog", "--to", "a blue dog", "--edits", "more.csv", *drawn]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "edited" in said.out and "related" in said.out and "aligned tokens that differ" in said.err
    record = json.loads((edited_folder / "edit.json").read_text())
    assert [group["name"] for group in record["groups"]] == ["edited", "related", "unrelated"]
    assert record["groups"][0]["prompts"] == ["a red dog"] and record["groups"][0]["moved"] > 0
    assert "now: a blue dog" in (edited_folder / "edit.html").read_text()
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main(["edit", str(edited_folder), "--undo"]) == 0
    base = load(ModelConfig(model)).network.state_dict()
    for name, p in load(ModelConfig(str(edited_folder))).network.named_parameters():
        assert torch.equal(p, base[name])
    assert main(["edit", str(edited_folder), "--undo"]) == 2
    assert main(["edit", model, "--from", "a", "--output", "other"]) == 2
    assert "1 --from and 0 --to" in capsys.readouterr().err


def test_prompts_are_sorted_by_their_words(tmp_path):
    pairs = [Pair("red circle", "blue circle"), Pair("a sea", "a sea")]
    groups = sort_prompts(["a Red circle", "a red square", "the sea", "a red circles"], pairs)
    assert groups == {
        "edited": ["a Red circle"],
        "related": ["a red square", "a red circles"],
        "unrelated": ["the sea"],
    }
    assert meaning("a red circle, a sea", pairs) == "a blue circle, a sea"
    assert "blue circle" in own_prompts(pairs[:1]) and "a photo of red" in own_prompts(pairs[:1])
    (tmp_path / "bad.csv").write_text("source,to\na,b\n")
    with pytest.raises(UserError, match="an edit has `from` and `to`"):
        read_pairs(str(tmp_path / "bad.csv"))
