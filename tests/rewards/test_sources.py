"""Places and options after the colon of a spec."""

import pytest

from diffalign import rewards
from diffalign.cli import main
from diffalign.errors import UserError
from diffalign.rewards.sources import file_of, number, places_and_options, yes_or_no


@pytest.mark.parametrize(
    ("source", "places", "options"),
    [
        (None, ["", ""], {}),
        ("a.pt", ["a.pt", ""], {}),
        ("a.pt@owner/clip", ["a.pt", "owner/clip"], {}),
        ("scale=2.5", ["", ""], {"scale": "2.5"}),
        ("a.pt@scale=2.5@b", ["a.pt", "b"], {"scale": "2.5"}),
        ("prefix=a photo of@scale=1", ["", ""], {"prefix": "a photo of", "scale": "1"}),
        ("/x/epoch=3.pt", ["/x/epoch=3.pt", ""], {}),  # a path, as no option's name has a slash
    ],
)
def test_parts(source, places, options):
    assert places_and_options("x", source, 2, ["scale", "prefix"]) == (places, options)


@pytest.mark.parametrize("card", rewards.REGISTRY.values(), ids=lambda card: card.name)
def test_a_card_says_what_its_spec_needs(card, capsys):
    """Those that need a source say so, refuse to be loaded without one, and show it in their example."""
    assert card.checkpoint or card.source
    if card.source:
        with pytest.raises(UserError, match=f"reward '{card.name}' (needs|is a model behind an address)"):
            rewards.load(card.name)
    assert main(["rewards", card.name]) == 0
    spec = f"{card.name}:{card.source}" if card.source else card.name
    assert f"--rewards {spec} --prompts" in capsys.readouterr().out


def test_bad_parts(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'scael'; did you mean scale"):
        places_and_options("x", "scael=2", 1, ["scale"])
    with pytest.raises(UserError, match="'a@b@c' names 3 places; allowed are 2"):
        places_and_options("x", "a@b@c", 2, ["scale"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epoch=3.pt").write_text("")
    assert places_and_options("x", "epoch=3.pt", 1, ["scale"]) == (["epoch=3.pt"], {})


def test_values():
    assert [yes_or_no("x", "o", value) for value in ("yes", "True", "on", "no", "FALSE", "off")] == [
        True, True, True, False, False, False
    ]  # fmt: skip
    assert number("x", "o", "-2.5e-1") == -0.25
    with pytest.raises(UserError, match="reward 'x': o=maybe must be yes or no"):
        yes_or_no("x", "o", "maybe")
    for value in ("", "two", "nan", "inf"):
        with pytest.raises(UserError, match=f"reward 'x': o={value} must be a number"):
            number("x", "o", value)


def test_files(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_text("")
    assert file_of("x", str(tmp_path / "a.pt"), "f.pt") == tmp_path / "a.pt"
    assert file_of("x", str(tmp_path), "f.pt") == tmp_path / "f.pt"
    assert file_of("x", "/no/such", "f.pt").name == "such"
    asked = []
    monkeypatch.setattr(
        "diffalign.rewards.sources.fetched", lambda *arguments: asked.append(arguments) or tmp_path
    )
    assert file_of("x", "owner/name", "f.pt") == tmp_path and asked == [("x", "owner/name", "f.pt")]
