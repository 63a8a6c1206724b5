"""Prompts that are written for A1111 and ComfyUI are told apart from ordinary text."""

import pytest

from diffalign.cli import main
from diffalign.data.prompts.prompt_syntax import notes_on, syntax_note, syntax_of


@pytest.mark.parametrize(
    "piece",
    [
        "(red hat:1.3)", "(red:2)", "(red: .5 )", "((masterpiece))", "[[blurry]]", "[blurry]",
        "[cat:dog:0.5]", "[cat|dog]", "<lora:add_detail:0.8>", "<lyco:x:1>", "BREAK",
    ],
)  # fmt: skip
def test_syntax_is_found_in_a_prompt(piece):
    assert syntax_of(f"a cat, {piece}, at dusk") == piece


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat (small)", "a poster (16:9)", "a clock (at 10:30)", "a page (Luke 3:16)", "f (a (b) c)",
        r"a cat \(red:1.3\)", "a photo of [V] dog", "see [1]", "[a cat](http://a.b)", "BREAKING news",
        "a < b: c > d", "ratio (1.85:1)", "", "two (2) cats: one (1) dog",
    ],
)  # fmt: skip
def test_ordinary_text_is_not(prompt):
    assert syntax_of(prompt) == ""


def test_the_note_counts_prompts_and_shows_the_first_piece():
    assert syntax_note(["a", "b (c)"]) == ""
    assert syntax_note(["a", "a (b:1.2) (c:1.3)", "<lora:x:1>"]) == (
        "2 of 3 prompts have weights or tags of A1111 or ComfyUI, such as '(b:1.2)'; they are read as plain "
        "text"
    )
    assert f"{'x' * 56}..." in syntax_note([f"({'x' * 100}:1.2)"])


def test_generate_says_it_once(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a (red:1.3) cat\na dog\n")
    words = ["--steps", "1", "--height", "32", "--width", "32", "--output", str(tmp_path / "o")]
    assert main(["generate", "tiny:sd15", "--prompts", str(tmp_path / "p.txt"), *words]) == 0
    assert capsys.readouterr().err.count("note: 1 of 2 prompts have weights or tags") == 1


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (
            ["# animals", "a cat", "a dog"],
            "1 of 3 prompts begin with # or //, as comments do, such as '# animals'",
        ),
        (['"a cat"', '"a dog"'], "2 of 2 prompts are in quotation marks"),
        (["1. a cat", "2. a dog"], "2 of 2 prompts begin with the number or the sign of a list"),
        (["- a cat", "- a dog", "x"], "2 of 3 prompts begin with the number or the sign of a list"),
    ],
)
def test_signs_of_lists_are_told(prompts, words):
    (note,) = notes_on(prompts)
    assert words in note and note.endswith("they are read as they are")


def test_prompts_that_only_look_alike_are_not():
    assert list(notes_on(["#1 fan", '"Hi", said the cat', "2 cats", "3. Reich", "a-b", '"a sign"'])) == []
