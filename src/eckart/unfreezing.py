"""Spectrum's files: which parameters to train, by signal-to-noise ratio, for axolotl and TRL scripts.

Spectrum (arXiv 2406.06623) trains, of each type of module, the share with the highest ratio of signal to noise. Its
scanner writes the ratios to `snr_results_MODEL.json` and the choice to a YAML list of names. Both are written and read
here, with the ratio at the Tracy-Widom edge, not the defective threshold of LaserRMT (`eckart.noise.laserrmt_edge`),
and without norms, whose ratio is always infinite there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eckart.errors import EckartError

TOP = 0.25
"""Share of the parameters of a type that is trained."""


@dataclass(frozen=True)
class SignalRatio:
    """A module's ratio of signal to noise."""

    snr: float | None
    """Sum of the singular values above the edge over the sum of those below; None where it is not finite."""
    type: str
    """The module's place in its block, such as `mlp.down_proj`."""


def module_type(name: str) -> str:
    """Give a module's place in its block: its path from the last number on.

    Args:
        name: Path of a module.

    Returns:
        The path; all of it where it has no number.

    >>> module_type("model.layers.11.mlp.down_proj")
    'mlp.down_proj'
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers and numbers[0] + 1 < len(parts) else name


def choose(ratios: Mapping[str, SignalRatio], top: float = TOP) -> dict[str, list[str]]:
    """Choose what to train: of each type the share with the highest ratio, at least one.

    Args:
        ratios: Module -> ratio. One that is not finite is never chosen.
        top: The share, `0 < top <= 1`.

    Returns:
        Type -> modules, the highest ratio first; of equal ones the first.

    Raises:
        EckartError: `top` is outside its range.
    """
    if not 0 < top <= 1:
        raise EckartError(f"top {top} is not a share of parameters. It is above 0 and at most 1. Change --top.")
    groups: dict[str, list[str]] = {}
    for name, ratio in ratios.items():
        if ratio.snr is not None and math.isfinite(ratio.snr):
            groups.setdefault(ratio.type, []).append(name)
    return {
        kind: sorted(names, key=lambda name: -(ratios[name].snr or 0))[: max(1, math.floor(top * len(names) + 1e-9))]
        for kind, names in groups.items()
    }


def unfrozen_parameters(
    chosen: Mapping[str, Iterable[str]], *, always: Iterable[str] = (), bare: Iterable[str] = ()
) -> str:
    """Write a choice as the YAML that axolotl and TRL scripts read.

    Each item is a regular expression for the whole name of a parameter. Its points are not escaped: axolotl takes them
    for plain points itself, and an escaped one would match nothing there.

    Args:
        chosen: Type -> modules, from `choose`.
        always: Parameters that are trained besides: embeddings and the head, as Spectrum has it.
        bare: Modules that are parameters themselves, without `.weight`, such as stacks of experts.

    Returns:
        YAML text, a key `unfrozen_parameters` with a list.
    """
    whole = set(bare)
    lines = ["unfrozen_parameters:", *(f"- {_item(f'^{name}$')}" for name in always)]
    for kind, names in chosen.items():
        lines.append(f"# {''.join(c if c.isprintable() else ' ' for c in kind)} layers")
        lines += [f"- {_item(f'^{name}$' if name in whole else f'^{name}.weight$')}" for name in names]
    return "\n".join(lines) + "\n"


def _item(pattern: str) -> str:
    """A pattern as YAML reads it back: quoted where it is not plain."""
    if re.fullmatch(r"\^[\w.-]+\$", pattern, re.ASCII):
        return pattern
    return yaml.safe_dump(pattern, default_style='"', width=10**9).strip()


def read_unfrozen_parameters(path: Path) -> tuple[str, ...]:
    """Read such a YAML file.

    Args:
        path: Written by eckart or by Spectrum, whose items are names or beginnings of names.

    Returns:
        The regular expressions, each valid, for `re.match` against names of parameters.

    Raises:
        EckartError: It is missing, not YAML, has no such list, or an item is no regular expression.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EckartError(f"{path} does not exist. `eckart inspect` writes one. Check the path.") from None
    except Exception as error:  # PyYAML lets ValueError, RecursionError and others through
        raise EckartError(
            f"{path} cannot be read: {' '.join(str(error).split())}. It is a YAML file. Check it."
        ) from None
    items = found.get("unfrozen_parameters") if isinstance(found, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise EckartError(
            f"{path} has no list of names under 'unfrozen_parameters'. Spectrum's files have that one key. "
            "Give the YAML file, not the JSON beside it."
        )
    for item in items:
        try:
            re.compile(item)
        except re.error as error:
            raise EckartError(
                f"{path} holds {item!r}, which is no regular expression: {error}. "
                "An item matches names of parameters. Correct it."
            ) from None
    return tuple(items)


def write_ratios(ratios: Mapping[str, SignalRatio]) -> str:
    """Write ratios as Spectrum's `snr_results_MODEL.json`, but strict JSON: what is not finite is null.

    Args:
        ratios: Module -> ratio.

    Returns:
        JSON text.
    """
    content = {name: {"snr": _finite(ratio.snr), "type": ratio.type} for name, ratio in ratios.items()}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_ratios(path: Path) -> dict[str, SignalRatio]:
    """Read ratios as Spectrum, LaserRMT or eckart wrote them.

    Args:
        path: A JSON object {module: {"snr", "type"}}; bare numbers for modules are understood too, and so are the
            `Infinity` and `NaN` of the originals, which come as None.

    Returns:
        Module -> ratio, in the order of the file.

    Raises:
        EckartError: It is missing, not JSON, or of another form.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EckartError(f"{path} does not exist. `eckart inspect` writes one. Check the path.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EckartError(f"{path} is not JSON: {error}. It is what a scan wrote. Make it again.") from None
    if not isinstance(found, dict):
        raise EckartError(
            f"{path} holds a {type(found).__name__}. Ratios are an object of modules. Give a file that a scan wrote."
        )
    ratios = {}
    for name, entry in found.items():
        snr, kind = (entry.get("snr"), entry.get("type")) if isinstance(entry, dict) else (entry, None)
        number = isinstance(snr, (int, float)) and not isinstance(snr, bool)
        if not (number or snr is None) or not (isinstance(kind, str) or kind is None):
            raise EckartError(
                f"{path} has {entry!r:.100} for {name!r:.100}. A module has a ratio and a type. "
                "Give a file that a scan wrote."
            )
        ratios[name] = SignalRatio(_finite(snr), module_type(name) if kind is None else kind)
    return ratios


def _finite(value: float | None) -> float | None:
    try:
        return float(value) if value is not None and math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None
