"""The ratchet of strict types: no module may have more errors than recorded.

``python -m tests.strict_types`` counts those of ``mypy --strict`` by module; ``strict_types.json`` holds the
counts, and ``--update`` records fewer.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

RECORD = Path(__file__).with_name("strict_types.json")


def counted(report: str) -> Counter[str]:
    """Return the number of errors of each module in a report of mypy."""
    return Counter(re.findall(r"^(\S+?):\d+: error:", report, flags=re.MULTILINE))


def worse(found: Counter[str], recorded: dict[str, int]) -> list[str]:
    """Return a line for each module with more errors than recorded."""
    return [
        f"{module}: {count} errors of mypy --strict, {recorded.get(module, 0)} recorded"
        for module, count in sorted(found.items())
        if count > recorded.get(module, 0)
    ]


def main(arguments: list[str]) -> int:
    """Count, compare, and with ``--update`` record; return the exit status."""
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ".mypy_cache/strict"]
    report = subprocess.run(command, capture_output=True, text=True, cwd=RECORD.parents[1]).stdout
    if "errors in" not in report and "no issues found" not in report:
        print(f"mypy --strict did not run:\n{report[-2000:]}", file=sys.stderr)
        return 2
    found = counted(report)
    recorded: dict[str, int] = json.loads(RECORD.read_text())
    grown = worse(found, recorded)
    if grown:
        modules = {line.partition(":")[0] for line in grown}
        places = [line for line in report.splitlines() if line.partition(":")[0] in modules]
        print("\n".join([*grown, *places]), file=sys.stderr)
        return 1
    if "--update" in arguments:
        RECORD.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    print(f"mypy --strict: {found.total()} errors, {sum(recorded.values())} recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
