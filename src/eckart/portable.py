"""A modeling file for a factored folder, so that it loads where eckart is not installed, if remote code is trusted.

The file is put together from the sources of this package: what `quantizer.register` needs, and nothing else. It imports
torch and transformers only.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from eckart.quantizer import MODELING

_PACKAGE = "eckart."


@dataclass(frozen=True)
class _Piece:
    """A statement of a module, with the comments above it and the docstring below."""

    text: str
    names: frozenset[str]
    """What it defines."""
    uses: frozenset[str]
    """Names that occur in it, whatever they mean."""


def add_modeling(folder: Path, model: nn.Module) -> None:
    """Make a factored folder portable: `from_pretrained(folder, trust_remote_code=True)` needs no eckart then.

    Args:
        folder: As `save_pretrained` wrote it. Gets `modeling_eckart.py`; its config.json gets `auto_map`.
        model: The model in it. Every `Auto…` class that transformers has for its config is mapped. Not modified.
    """
    classes = auto_classes(model)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{MODELING}.{name}" for auto, name in classes.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / f"{MODELING}.py").write_text(modeling_source(sorted(set(classes.values()))), encoding="utf-8")


def auto_classes(model: Any) -> dict[str, str]:
    """List the `Auto…` classes that can load a model.

    Args:
        model: A transformers model. Not modified.

    Returns:
        Auto class -> the class that it makes of this model's config.
    """
    found: dict[str, str] = {}
    for name in sorted(dir(transformers)):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is None or type(model.config) not in mapping:
            continue
        # A few configs have several classes; that of the model is meant, where it is one of them.
        made = mapping[type(model.config)]
        made = (
            next((each for each in made if each is type(model)), made[0]) if isinstance(made, (list, tuple)) else made
        )
        # Another prefix means other names of weights, of which transformers would find none in this folder.
        if made.base_model_prefix == model.base_model_prefix:
            found[name] = made.__name__
    return found


def modeling_source(classes: list[str]) -> str:
    """Write the modeling file.

    Args:
        classes: transformers' classes that it offers, under their own names.

    Returns:
        Python source.
    """
    imports: dict[str, set[str]] = {"import transformers": set()}
    pieces: dict[str, list[_Piece]] = {}
    _collect("quantizer", {"register"}, pieces, imports)
    body = [piece.text for module in pieces.values() for piece in module]
    defined = [name for module in pieces.values() for piece in module for name in piece.names]
    twice = {name for name in defined if defined.count(name) > 1}
    assert not twice, f"{sorted(twice)} are defined in two modules that a portable folder needs: rename one"
    return "\n".join(
        [
            f'"""Low-rank layers for transformers: the parts of eckart {version("eckart")} that load this folder.',
            "",
            "Written by a program from eckart's sources (Apache License 2.0). It registers how this folder's layers",
            "are built, unless eckart is there and did, and offers the classes of transformers under their own names.",
            '"""',
            "",
            "from __future__ import annotations",
            "",
            *(start + ", ".join(sorted(names)) for start, names in sorted(imports.items())),
            "",
            *(f"\n{text}\n" for text in body),
            *(f'\nclass {name}(transformers.{name}):\n    """That of transformers."""\n' for name in classes),
            "",
            "register()",
            "",
        ]
    )


def _collect(module: str, wanted: set[str], pieces: dict[str, list[_Piece]], imports: dict[str, set[str]]) -> None:
    """Add what the wanted names of a module need, modules that it imports first."""
    source = inspect.getsource(importlib.import_module(_PACKAGE + module))
    tree = ast.parse(source)
    every = list(_pieces(source, tree))
    needed: list[_Piece] = []
    reached = set(wanted)
    while missing := [piece for piece in every if piece.names & reached and piece not in needed]:
        needed += missing
        reached.update(*(piece.uses for piece in missing))
    elsewhere: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update({f"import {alias.name}": set() for alias in node.names if alias.name in reached})
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            for alias in node.names:
                if alias.name in reached and node.module.startswith(_PACKAGE):
                    elsewhere.setdefault(node.module.removeprefix(_PACKAGE), set()).add(alias.name)
                elif alias.name in reached and node in tree.body:
                    imports.setdefault(f"from {node.module} import ", set()).add(alias.name)
    for other, names in elsewhere.items():
        _collect(other, names, pieces, imports)
    known = pieces.setdefault(module, [])
    known += [piece for piece in needed if piece not in known]
    known.sort(key=every.index)


def _pieces(source: str, tree: ast.Module) -> Iterator[_Piece]:
    lines = source.splitlines()
    for number, node in enumerate(tree.body):
        names = _defined(node)
        if not names:
            continue
        start = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]) - 1
        while start and lines[start - 1].startswith("#"):
            start -= 1
        end = node.end_lineno or node.lineno
        after = tree.body[number + 1] if number + 1 < len(tree.body) else None
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            end = after.end_lineno or end
        uses = frozenset(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
        yield _Piece("\n".join(lines[start:end]), names, uses)


def _defined(node: ast.stmt) -> frozenset[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return frozenset({node.name})
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))
