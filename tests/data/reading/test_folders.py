"""Folders of pairs: what is used, and what is not, by count and name."""

import pytest

from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.errors import UserError
from tests.data.conftest import picture, png


def read(path, **settings):
    return read_preferences(DataConfig(path=str(path), resolution=16, **settings))


def folder(root, names=("1", "2"), sides=("w", "l"), suffix="png"):
    for side in sides:
        (root / side).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / side / f"{name}.{suffix}").write_bytes(png(int(name)))
            (root / side / f"{name}.txt").write_text(f"prompt {name}")
    return root


@pytest.mark.parametrize("kind", ["AVIF", "JPEG", "WEBP", "JPEG2000"])
def test_suffixes_of_today(tmp_path, kind):
    suffix = {"AVIF": "avif", "JPEG": "jfif", "WEBP": "webp", "JPEG2000": "jp2"}[kind]
    for side, seed in (("w", 1), ("l", 2)):
        (tmp_path / side).mkdir()
        picture(seed).save(tmp_path / side / f"1.{suffix}", kind)
        (tmp_path / side / "1.txt").write_text("x")
    assert len(list(read(tmp_path))) == 1 and read(tmp_path).notes == ()


def test_hidden_files_are_nothing(tmp_path):
    folder(tmp_path)
    (tmp_path / "w" / "._1.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "w" / ".DS_Store").touch()
    (tmp_path / "__MACOSX" / "w").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "w" / "1.png").write_bytes(png(1))
    preferences = read(tmp_path)
    assert len(list(preferences)) == 2
    assert preferences.notes == ()
    (tmp_path / "l" / "2.txt").write_text("another prompt")
    assert read(tmp_path).notes == ("1 other files not used: l/2.txt",)


def test_what_is_not_used_is_counted_and_named(tmp_path):
    folder(tmp_path, sides=("w",))
    folder(tmp_path / "x", sides=("l",))
    (tmp_path / "x" / "l").rename(tmp_path / "l")
    for file in (tmp_path / "l").glob("*.txt"):
        file.unlink()
    (tmp_path / "w" / "more").mkdir()
    (tmp_path / "w" / "more" / "3.png").write_bytes(png(3))
    (tmp_path / "4_w.png").write_bytes(png(4))
    (tmp_path / "w" / "1.psd").write_bytes(b"8BPS")
    assert read(tmp_path).notes == (
        "2 images or videos not used: 4_w.png, w/more/3.png",
        "1 other files not used: w/1.psd",
    )


def test_a_caption_in_another_encoding_is_named(tmp_path):
    folder(tmp_path)
    (tmp_path / "w" / "2.txt").write_bytes(b"a sailor\x92s caf\xe9")
    with pytest.raises(UserError, match=r"w/2\.txt line 1: not UTF-8 text"):
        read(tmp_path)
    (tmp_path / "w" / "2.txt").write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9\n")
    assert [example.prompt for example in read(tmp_path)] == ["prompt 1", "a caf\u00e9"]


@pytest.mark.parametrize(
    "settings", [{"split": "test"}, {"columns": ("prompt=x",)}, {"label": "VQ"}, {"config": "x"}]
)
def test_settings_of_tables_are_refused(tmp_path, settings):
    with pytest.raises(UserError, match=f"data.{next(iter(settings))} is .*; it is for"):
        read(folder(tmp_path), **settings)


@pytest.mark.parametrize("suffix", ["TXT", "caption"])
def test_captions_with_other_suffixes_are_read(tmp_path, suffix):
    folder(tmp_path)
    for file in tmp_path.glob("*/*.txt"):
        file.rename(file.with_suffix(f".{suffix}"))
    assert [example.prompt for example in read(tmp_path)] == ["prompt 1", "prompt 2"]
    assert read(tmp_path).notes == ()


def test_files_that_may_be_captions_are_named(tmp_path):
    folder(tmp_path)
    for file in tmp_path.glob("*/*.txt"):
        file.rename(file.with_suffix(".json"))
    with pytest.raises(
        UserError, match=r"no caption for 1, 2 \(found is 1\.json\); needed 1\.txt .*\.caption"
    ):
        read(tmp_path)
