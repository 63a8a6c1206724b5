"""``diffalign new``: what it writes fails until it is filled in, and then passes."""

import os
import shutil
import subprocess
import sys

import pytest

from diffalign.cli import main
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the package and of what its tests import, without weights."""
    root = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("weights", "__pycache__", "golden", "published")
    for folder in ("diffalign", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=skip)
    (root / "configs").mkdir()
    for name in ("CHANGELOG.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


def tried(checkout, *tests):
    """The output of the tests in the copy."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.stdout


def fill(path, *replacements):
    text = path.read_text()
    for old, new in replacements:
        assert old in text, (path, old)
        text = text.replace(old, new)
    path.write_text(text)


def test_a_method_a_reward_and_a_family(checkout, capsys):
    for kind, name in (("method", "square"), ("reward", "redness"), ("family", "sana")):
        assert main(["new", kind, name, "--root", str(checkout)]) == 0
        assert f"test_{name}.py" in capsys.readouterr().out
    tests = ["tests/methods/test_square.py", "tests/rewards/test_redness.py", "tests/models/test_sana.py"]
    said = tried(checkout, *tests)
    assert " passed" not in said and "FILL IN: the loss of square" in said
    assert "FILL IN: the score of redness" in said and "FILL IN: a tiny pipeline of sana" in said

    places = ["diffalign/methods/square.py", "configs/tiny_sdxl_square.yaml", "CHANGELOG.md"]
    places += ["diffalign/rewards/zoo/redness.py", "diffalign/rewards/cards/rules.py"]
    fill(
        checkout / places[0],
        (
            'raise NotImplementedError("FILL IN: the loss of square")',
            "return (1 - self.beta * margin).square()",
        ),
    )
    fill(
        checkout / tests[0],
        (
            'raise NotImplementedError("FILL IN: the formula of square, independent of its implementation")',
            "return np.mean((1 - beta * margins) ** 2)",
        ),
    )
    fill(
        checkout / places[3],
        (
            'raise NotImplementedError("FILL IN: the score of redness")',
            "red = image.getchannel(0)\n"
            "    return sum(i * n for i, n in enumerate(red.histogram())) / (red.width * red.height)",
        ),
    )
    fill(
        checkout / tests[1],
        ("import pytest\n", "import numpy as np\nimport pytest\n"),
        (
            'raise NotImplementedError("FILL IN: the formula of redness, independent of its implementation")',
            "return np.asarray(image)[..., 0].mean()",
        ),
    )
    said = tried(checkout, *tests[:2])
    assert "2 failed" in said and said.count("test_nothing_is_left_to_fill_in") >= 2, said[-3000:]
    for place in places:
        fill(checkout / place, ("FILL IN", "Written"))
    said = tried(checkout, *tests[:2])
    assert " passed" in said and "failed" not in said and "error" not in said, said[-3000:]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["methd", "a"], "unknown kind 'methd'; did you mean method"),
        (["method", "My-Method"], "NAME='My-Method'; allowed: lower-case letters"),
        (["method", "lambda"], "NAME='lambda'; allowed"),
        (["method", "dpo"], "NAME='dpo' is taken: diffalign/methods/dpo.py"),
    ],
)
def test_what_is_refused(argv, words, capsys):
    before = (ROOT / "CHANGELOG.md").read_text()
    assert main(["new", *argv, "--root", str(ROOT)]) == 2
    assert words in capsys.readouterr().err
    assert (ROOT / "CHANGELOG.md").read_text() == before


def test_a_folder_that_is_no_checkout(tmp_path, capsys):
    assert main(["new", "method", "a", "--root", str(tmp_path)]) == 2
    assert "is no checkout of diffalign" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
