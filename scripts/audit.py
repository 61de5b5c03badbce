"""Audit of the dependencies: pip-audit where it can reach its data, else against the pins and the list of what was looked up.

    python scripts/audit.py [--offline] [--only NAME,NAME] [--renew]

Exit code 1 for a known vulnerability, a package that is installed without a pin, or one that differs from its pin.
`--renew` writes docs/audited.json anew from constraints.txt; what was looked up for the same version stays.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

SECONDS = 60
PINS, KNOWN = Path("constraints.txt"), Path("docs/audited.json")
OUR_OWN = {"tensorpress", "pip", "setuptools", "wheel"}
"""What is never pinned: ourselves, and what installs."""


def plain(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """Name -> version of a constraints file."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {plain(line.partition("==")[0].strip()): line.partition("==")[2].strip() for line in lines if "==" in line}


def installed() -> dict[str, str]:
    return {plain(package.metadata["Name"]): package.version for package in metadata.distributions()}


def same(version: str, pin: str) -> bool:
    """Whether an installed version is the pinned one; a build such as `+cpu` may be of it."""
    return version == pin or version.partition("+")[0] == pin


def not_pinned(found: dict[str, str], pins: dict[str, str]) -> list[str]:
    """A line for each installed package without a pin, or of another version than its pin."""
    lines = []
    for name, version in sorted(found.items()):
        if name in OUR_OWN:
            continue
        if name not in pins:
            lines.append(f"{name} {version} is not pinned in {PINS}")
        elif not same(version, pins[name]):
            lines.append(f"{name} {version} is installed; {PINS} has {pins[name]}")
    return lines


def ask_pip_audit() -> tuple[list[str], list[str]] | None:
    """A line for each known vulnerability of what is pinned, and the names that could not be looked up.

    None where pip-audit is not there or reaches none of its data: it then calls every package skipped, and says that no
    vulnerability is known.
    """
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip"]
    try:
        ended = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off", "--timeout", "10"],
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        answer = json.loads(ended.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return None
    skipped = [package["name"] for package in answer if "skip_reason" in package]
    if len(skipped) == len(answer):
        return None
    flaws = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'no version'}"
        for package in answer
        for flaw in package.get("vulns", [])
    ]
    return flaws, skipped


def compare_with_list(found: dict[str, str]) -> tuple[list[str], list[str]]:
    """Lines for vulnerabilities that the list names and for packages that it does not have; and for what nobody looked up."""
    entries = {(e["name"], e["version"]): e for e in json.loads(KNOWN.read_text(encoding="utf-8"))}
    problems, unchecked = [], []
    for name, version in sorted(found.items()):
        entry = entries.get((name, version)) or entries.get((name, version.partition("+")[0]))
        if name in OUR_OWN:
            continue
        if entry is None:
            problems.append(f"{name} {version} is not in {KNOWN}: look it up, then --renew")
        elif entry.get("vulnerable"):
            problems.append(
                f"{name} {version}: {', '.join(entry['vulnerable'])} ({entry['source']}, {entry['checked']})"
            )
        elif entry["checked"] is None:
            unchecked.append(name)
    return problems, unchecked


def renew() -> None:
    """Write the list from the pins; what was looked up for the same version stays."""
    old = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.is_file() else []
    known = {(entry["name"], entry["version"]): entry for entry in old}
    blank = {"checked": None, "source": None, "vulnerable": []}
    rows = [known.get(pin) or {"name": pin[0], "version": pin[1], **blank} for pin in sorted(read_pins(PINS).items())]
    KNOWN.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")


def main() -> int:
    """Audit, and say what was done."""
    options = argparse.ArgumentParser(description="audit of the dependencies")
    options.add_argument("--offline", action="store_true", help="do not ask pip-audit")
    options.add_argument("--only", default="", help="names of packages, with commas between them")
    options.add_argument("--renew", action="store_true", help="write docs/audited.json from constraints.txt")
    asked = options.parse_args()
    if asked.renew:
        renew()
        return 0
    wanted = {plain(name) for name in asked.only.split(",") if name}
    found = {name: version for name, version in installed().items() if not wanted or name in wanted}
    problems = not_pinned(found, read_pins(PINS))
    asked_now = None if asked.offline else ask_pip_audit()
    if asked_now is not None:
        flaws, skipped = asked_now
        print(f"audit: pip-audit looked up the pins of {PINS} now, but for {len(skipped)} that it could not")
        problems += flaws
        found = {name: version for name, version in found.items() if name in {plain(name) for name in skipped}}
    else:
        why = "was not asked" if asked.offline else "is not there or did not reach its data"
        print(f"audit: pip-audit {why}")
    listed, unchecked = compare_with_list(found)
    problems += listed
    print(f"audit: {len(found)} installed packages were compared with {KNOWN}, not looked up now")
    print(f"audit: {len(unchecked)} of them were never looked up by anybody")
    for line in problems:
        print(f"audit: problem: {line}")
    print(f"audit: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
