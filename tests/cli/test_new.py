"""``diffalign new``: its files fail until they are filled in, and then pass."""

import importlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from diffalign import methods, rewards
from diffalign.cli import main
from diffalign.models import families
from diffalign.models.families.registry import FAMILIES, get_family
from diffalign.rewards import zoo
from diffalign.rewards.registry import REGISTRY
from diffalign.runs.validate import read_run
from tests import helpers
from tests.helpers import ROOT

EDITED = ("diffalign/plane/settings.py", "diffalign/rewards/cards/rules.py")
EDITED += ("diffalign/models/families/image_cards.py", "CHANGELOG.md")


class Outcomes:
    """A plugin of pytest that records each test's outcome and the text of its failure."""

    def __init__(self):
        self.outcome, self.text = {}, ""

    def pytest_collectreport(self, report):
        self.text += report.longreprtext

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition("::")[2]
        if report.when == "call" or not report.passed:
            self.outcome[name] = report.outcome
            self.text += report.longreprtext


class Checkout:
    """A folder with the files that ``new`` edits; its modules join the package of this process."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch = root, monkeypatch
        for place in EDITED:
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / place, root / place)
        for package in (methods, zoo, families):
            place = root.joinpath(*package.__name__.split("."))
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(place)])
        monkeypatch.setattr(helpers, "ROOT", root)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def fill(self, place, *replacements):
        path = self.root / place
        text = path.read_text()
        for old, new in replacements:
            assert old in text, (place, old)
            text = text.replace(old, new)
        path.write_text(text)

    def names(self, place):
        """Return what the edited module defines."""
        return runpy.run_path(str(self.root / place))

    def tried(self, test, *modules):
        """Return the outcomes of a test file, its modules imported anew."""
        for name in (*modules, (self.root / test).stem):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        found = Outcomes()
        off = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception", "logging")
        options = [word for name in off for word in ("-p", f"no:{name}")]
        config = [
            "-q",
            "-c",
            str(self.root / "pytest.ini"),
            "--rootdir",
            str(self.root),
            "--import-mode=prepend",
        ]
        (self.root / "pytest.ini").write_text("[pytest]\n")
        pytest.main([*config, *options, str(self.root / test)], plugins=[found])
        return found


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    before = set(sys.modules)
    yield Checkout(tmp_path, monkeypatch)
    for name in set(sys.modules) - before:
        if name.rpartition(".")[2].removeprefix("test_") in ("square", "redness", "auraflow"):
            del sys.modules[name]


def new(checkout, kind, name, capsys):
    """Write one of a kind; return its test and the other places that it wrote or edited."""
    assert main(["new", kind, name, "--root", str(checkout.root)]) == 0
    places = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    test = next(place for place in places if place.startswith("tests/"))
    return test, [place for place in places if place != test]


def finish(checkout, test, places, module):
    """Assert that the filled-in files fail for the words FILL IN alone, and pass without these."""
    found = checkout.tried(test, module)
    last = found.outcome.pop("test_nothing_is_left_to_fill_in")
    assert last == "failed" and set(found.outcome.values()) == {"passed"}, found.text[-3000:]
    for place in places:
        if place != "diffalign/plane/settings.py":
            checkout.fill(place, ("FILL IN", "Written"))
    found = checkout.tried(test, module)
    assert set(found.outcome.values()) == {"passed"}, found.text[-3000:]
    assert "test_nothing_is_left_to_fill_in" in found.outcome and len(found.outcome) >= 3


def test_a_method(checkout, capsys):
    test, places = new(checkout, "method", "square", capsys)
    found = checkout.tried(test)
    assert set(found.outcome.values()) == {"failed"} and "FILL IN: the loss of square" in found.text
    checkout.fill(
        "diffalign/methods/square.py",
        (
            'raise NotImplementedError("FILL IN: the loss of square")',
            "return (1 - self.beta * (chosen - rejected)).square()",
        ),
    )
    checkout.fill(
        test,
        (
            'raise NotImplementedError("FILL IN: the formula of square, independent of its implementation")',
            "return np.mean((1 - beta * (chosen - rejected)) ** 2)",
        ),
    )
    finish(checkout, test, places, "diffalign.methods.square")
    row = checkout.names("diffalign/plane/settings.py")["PLANE_METHODS"]["square"]
    assert type(row.method).__name__ == "Square" and row.method.beta == 100
    assert read_run(checkout.root / "configs/tiny_sdxl_square.yaml").method["type"] == "square"
    assert set(places) == {
        "diffalign/methods/square.py",
        "configs/tiny_sdxl_square.yaml",
        "docs/methods/square.md",
        EDITED[0],
        EDITED[3],
    }


def test_a_reward(checkout, capsys, monkeypatch):
    test, places = new(checkout, "reward", "redness", capsys)
    card = next(card for card in checkout.names(EDITED[1])["CARDS"] if card.name == "redness")
    monkeypatch.setitem(REGISTRY, "redness", card)
    found = checkout.tried(test)
    assert set(found.outcome.values()) == {"failed"} and "FILL IN: the score of redness" in found.text
    checkout.fill(
        "diffalign/rewards/zoo/redness.py",
        (
            'raise NotImplementedError("FILL IN: the score of redness")',
            "red = image.getchannel(0)\n"
            "    return sum(i * n for i, n in enumerate(red.histogram())) / (red.width * red.height)",
        ),
    )
    checkout.fill(
        test,
        ("import pytest\n", "import numpy as np\nimport pytest\n"),
        (
            'raise NotImplementedError("FILL IN: the formula of redness, independent of its implementation")',
            "return np.asarray(image)[..., 0].mean()",
        ),
    )
    finish(checkout, test, places, "diffalign.rewards.zoo.redness")
    assert type(rewards.load("redness")).__name__ == "Redness"


def test_a_family(checkout, capsys, monkeypatch):
    """Filled in, it answers for a tiny Stable Diffusion 1.x what the family of that model answers."""
    test, places = new(checkout, "family", "auraflow", capsys)
    recognised = 'pipeline="StableDiffusionPipeline", recognised_by=(("unet", "cross_attention_dim", 16),)'
    checkout.fill(EDITED[2], ('pipeline="FILL IN"', recognised))
    (named,) = (card for card in checkout.names(EDITED[2])["IMAGES"] if card.name == "auraflow")
    monkeypatch.setitem(FAMILIES, "auraflow", named)
    found = checkout.tried(test)
    assert {"failed"} == set(found.outcome.values()) and "FILL IN: a tiny pipeline" in found.text
    checkout.fill(
        "diffalign/models/families/auraflow.py",
        (
            "from diffalign.types import Cond\n",
            "from diffalign.models.families.sd15 import SD15\nfrom diffalign.types import Cond\n",
        ),
        ('network_class: str = "FILL IN"', 'network_class: str = "UNet2DConditionModel"'),
        ('network_name: str = "transformer"', 'network_name: str = "unet"'),
        ('raise NotImplementedError("FILL IN: the patch of auraflow")', "return SD15.patch(network_config)"),
        (
            'raise NotImplementedError("FILL IN: how auraflow encodes prompts")',
            "return SD15.encode_prompts(pipeline, prompts)",
        ),
        (
            'raise NotImplementedError("FILL IN: the negative conditions of auraflow")',
            "return SD15.negative(pipeline, n)",
        ),
        (
            'raise NotImplementedError("FILL IN: how the network of auraflow is called")',
            "return SD15.call(network, x_t, model_time, cond)",
        ),
        (
            'raise NotImplementedError("FILL IN: the shapes of the conditions of auraflow")',
            "return SD15.cond_shapes(configs)",
        ),
    )
    checkout.fill(
        test,
        (
            "from tests.helpers import ROOT\n",
            "from tests.helpers import ROOT\n"
            "from tests.models.test_stock import drawn, noise_of, ours, stock\n"
            "from tests.tiny_pipelines import make_sd15\n",
        ),
        (
            'raise NotImplementedError("FILL IN: a tiny pipeline, as tests/tiny_pipelines.py makes others")',
            "return make_sd15(folder)",
        ),
        (
            'raise NotImplementedError("FILL IN: compare from equal noise, as tests/models/test_stock.py '
            'does")',
            "noise = noise_of(model)\n"
            '    expected = drawn(model, stock(model, model.source), noise, 4.0, "latent")\n'
            "    assert ours(model, noise, 4.0).numpy() == pytest.approx(expected.numpy(), abs=1e-4)",
        ),
    )
    finish(checkout, test, places, "diffalign.models.families.auraflow")
    assert get_family("auraflow").name == "auraflow" and FAMILIES["auraflow"].title == "Auraflow"


@pytest.mark.parametrize(
    ("kind", "name"), [("method", "a_long_name"), ("reward", "a_long_name"), ("family", "zz")]
)
def test_what_is_written_is_clean(checkout, kind, name, capsys):
    """It passes ruff as it is, with imports in order and lines within the limit."""
    test, places = new(checkout, kind, name, capsys)
    files = [place for place in (test, *places) if place.endswith(".py")]
    shutil.copy(ROOT / "pyproject.toml", checkout.root)
    ours = ["--no-cache", "--config", "lint.isort.known-first-party=['diffalign', 'tests']"]
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, *ours, *files]
        done = subprocess.run(ruff, capture_output=True, text=True, cwd=checkout.root)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_a_method_has_the_parts_of_every_page(checkout, capsys):
    new(checkout, "method", "square", capsys)
    titles = re.findall(r"^## .*$", (checkout.root / "docs/methods/square.md").read_text(), re.MULTILINE)
    assert titles == [
        "## Formula",
        "## What the paper reports",
        "## Differences from the released code",
        "## When to use it",
    ]


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
