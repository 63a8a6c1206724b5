"""``diffalign new``: templates of a method, a reward or a model family, with a test that fails until filled
in.

In a checkout it writes the module, its value test and what registers it: for a method its page, the row on
the plane, the tiny recipe and the line of the changelog, for a reward and a family the card and the line.
Places to complete are marked FILL IN, and the new tests fail while a mark is left.
"""

import argparse
import datetime
import keyword
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from diffalign.cli.common import make_parser, parse
from diffalign.errors import UserError, unknown
from diffalign.utils.files import write_atomic

KINDS: Mapping[str, Mapping[str, str]] = {
    "method": {
        "method.py.txt": "diffalign/methods/$name.py",
        "test_method.py.txt": "tests/methods/test_$name.py",
        "recipe.yaml.txt": "configs/tiny_sdxl_$name.yaml",
        "page.md.txt": "docs/methods/$name.md",
    },
    "reward": {
        "reward.py.txt": "diffalign/rewards/zoo/$name.py",
        "test_reward.py.txt": "tests/rewards/test_$name.py",
    },
    "family": {
        "family.py.txt": "diffalign/models/families/$name.py",
        "test_family.py.txt": "tests/models/test_$name.py",
    },
}
"""The files of each kind: template and path."""

PLANE, RULES, FAMILIES = (
    "diffalign/plane/settings.py",
    "diffalign/rewards/cards/rules.py",
    "diffalign/models/families/image_cards.py",
)

EXAMPLES = """
diffalign new method cpo
diffalign new reward sharpness --title "Sharpness by the Laplacian"
diffalign new family auraflow --root ~/diffalign
"""


def run(argv: Sequence[str]) -> int:
    """Write the files and name them; return the exit status."""
    parser = make_parser(
        "new", "Start a method, a reward or a model family in a checkout of diffalign.", EXAMPLES
    )
    parser.add_argument("kind", help="method, reward or family")
    parser.add_argument("name", help="module and configuration name: lower case, digits and underscores")
    parser.add_argument("--title", help="the name that the field uses; from NAME unless given")
    parser.add_argument(
        "--root", type=Path, default=Path(), help="the checkout; the working folder unless given"
    )
    args = parse(parser, argv)
    written = write(args)
    print("\n".join(f"  {path}" for path in written))
    test = next(path for path in written if path.startswith("tests/"))
    print(f"Fill in what says FILL IN; until then this fails: python -m pytest {test}")
    print("Then run `python -m benchmarks.readme`, which counts it in the README, and `make check`.")
    if args.kind == "method":
        print(
            "A loss of two rewards alone is better a class of diffalign/losses/pairwise.py: it is then a "
            "value of `loss` in every method of pairs."
        )
    return 0


def write(args: argparse.Namespace) -> list[str]:
    """Write all files of ``args.kind``, or none; return their places below the checkout.

    Raises:
        UserError: an unknown kind, a name that is no module name or exists, or a root that is no checkout.
    """
    if args.kind not in KINDS:
        raise unknown("kind", args.kind, KINDS)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", args.name) or keyword.iskeyword(args.name):
        raise UserError(f"NAME={args.name!r}; allowed: lower-case letters, digits and _, a letter first")
    root = args.root.expanduser()
    if not (root / PLANE).is_file() or not (root / "CHANGELOG.md").is_file():
        raise UserError(
            f"--root={str(args.root)!r} is no checkout of diffalign: it has no {PLANE} and CHANGELOG.md"
        )
    title = args.title or args.name.replace("_", " ").title()
    words = {
        "name": args.name,
        "klass": "".join(part.capitalize() for part in args.name.split("_")),
        "constant": args.name.upper(),
        "title": title,
        "year": str(datetime.date.today().year),
    }
    texts = {
        Template(place).substitute(words): template(name, words) for name, place in KINDS[args.kind].items()
    }
    taken = [place for place in texts if (root / place).exists()]
    if taken:
        raise UserError(f"NAME={args.name!r} is taken: {', '.join(taken)} exists")
    texts |= {
        place: edit((root / place).read_text("utf-8")) for place, edit in edits(args.kind, words).items()
    }
    for place, text in texts.items():
        write_atomic(root / place, text)
    return list(texts)


def template(name: str, words: Mapping[str, str]) -> str:
    """Return a template of this package with its words filled in."""
    return Template((files("diffalign.cli") / "templates" / name).read_text("utf-8")).substitute(words)


class Insertion:
    """A text put before the first match of a pattern, or after it."""

    def __init__(self, pattern: str, text: str, after: bool = False) -> None:
        self.pattern, self.text, self.after = pattern, text, after

    def __call__(self, content: str) -> str:
        """Return the content with the text inserted.

        Raises:
            UserError: no match of the pattern, so the checkout is of another version.
        """
        found = re.search(self.pattern, content, re.MULTILINE)
        if found is None:
            raise UserError(f"the checkout is of another version: no line matches {self.pattern!r}")
        at = found.end() if self.after else found.start()
        return content[:at] + self.text + content[at:]


class SortedImport:
    """An import of one name, put where ruff sorts it among the imports of its package.

    Attributes:
        package: package whose modules are imported from, one a line.
        line: the import, without a line end.
    """

    def __init__(self, package: str, line: str) -> None:
        self.package, self.line = package, line

    def __call__(self, content: str) -> str:
        """Return the content with the import.

        Raises:
            UserError: no import of the package, so the checkout is of another version.
        """
        pattern = rf"^from {re.escape(self.package)}\.\w+ import .*$"
        there = list(re.finditer(pattern, content, re.MULTILINE))
        if not there:
            raise UserError(f"the checkout is of another version: no line matches {pattern!r}")
        later = [found.start() for found in there if found[0].split()[1] > self.line.split()[1]]
        at = later[0] if later else there[-1].end() + 1
        return content[:at] + self.line + "\n" + content[at:]


class Edits:
    """Several insertions, in order."""

    def __init__(self, *insertions: Insertion | SortedImport) -> None:
        self.insertions = insertions

    def __call__(self, content: str) -> str:
        """Return the content with all texts inserted."""
        for insert in self.insertions:
            content = insert(content)
        return content


def edits(kind: str, words: Mapping[str, str]) -> dict[str, Edits]:
    """Return the edits of existing files, by path."""
    name, klass = words["name"], words["klass"]
    line = f"- FILL IN: what the {kind} `{name}` does, and its paper.\n"
    found = {"CHANGELOG.md": Edits(Insertion(r"^### Added\n\n", line, after=True))}
    if kind == "method":
        found[PLANE] = Edits(
            SortedImport("diffalign.methods", f"from diffalign.methods.{name} import {klass}"),
            Insertion(
                r"(?<=^PLANE_METHODS: Mapping\[str, PlaneRow\] = \{\n)",
                f'    "{name}": PlaneRow({klass}(beta=100)),\n',
            ),
        )
    elif kind == "reward":
        found[RULES] = Edits(Insertion(r"^\)\n", template("card_reward.txt", words)))
    else:
        found[FAMILIES] = Edits(Insertion(r"^IMAGES = \(\n", template("card_family.txt", words), after=True))
    return found
