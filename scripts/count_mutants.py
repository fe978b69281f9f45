"""Counts, by file, the mutants that scripts/mutants.sh tried; those of docs/mutants.md, which change nothing, apart.

Ends with 1 if fewer than 95% of the others were killed.
"""

import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

WANTED = 0.95
NOTICED = {"killed", "timeout"}  # an endless loop is noticed too


def mutmut(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def changes(diff: str) -> list[str]:
    """The removed and added lines."""
    return re.findall(r"^[-+](?!-- |\+\+ ).*", diff, re.MULTILINE)


def listed(text: str) -> set[tuple[str, ...]]:
    """(function, removed and added lines...) of the mutants in a document's diffs."""
    diffs = re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    mutants = [part for diff in diffs for part in re.findall(r"^@@ (.*)\n((?:[-+].*\n)+)", diff, re.MULTILINE)]
    return {(function, *changes(diff)) for function, diff in mutants}


def main() -> None:
    known = listed(Path("docs/mutants.md").read_text())
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for name, status in re.findall(r"^ *(\S+): (.*)$", mutmut("results", "--all", "true"), re.MULTILINE):
        function = re.sub(r"__mutmut_\d+$", "", name).removeprefix("aspo_lightning.")
        function = function.replace(".x_", ".").replace(".xǁ", ".").replace("ǁ", ".")
        if status == "not checked":
            continue
        if status in NOTICED:
            status = "killed"
        elif (function, *changes(diff := mutmut("show", name))) in known:
            status = "equivalent"
        else:
            print(f"@@ {function}  ({name}: {status})", *changes(diff), sep="\n")
            status = "alive"
        found[re.split(r"\.x[_ǁ]", name.removeprefix("aspo_lightning."))[0]][status] += 1
    found["all"] = sum(found.values(), Counter())
    print(f"\n{'file':<22}{'mutants':>9}{'equivalent':>12}{'killed':>8}{'share':>8}")
    for file, counts in found.items():
        share = counts["killed"] / max(1, counts["killed"] + counts["alive"])
        print(f"{file:<22}{counts.total():>9}{counts['equivalent']:>12}{counts['killed']:>8}{share:>8.1%}")
    sys.exit(share < WANTED)


if __name__ == "__main__":
    main()
