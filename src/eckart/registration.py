"""Makes `from_pretrained` understand folders that eckart wrote once eckart is imported, without importing transformers.

transformers has no entry points for quantizers, and importing it takes seconds. So its table of quantizers is filled
when it is there already, or else right after the module that holds it is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TABLE = "transformers.quantizers.auto"
FOLLOWERS = {TABLE: "eckart.quantizer", "eckart.quantizer": "eckart.elastic"}
"""Module -> what is imported once it has run. These modules register themselves at their ends. The quantizer may be
what imported transformers, and half done when the table is there; what builds on it then has to wait for it."""


class _Finder(MetaPathFinder):
    """Finds these modules as Python would, and has them run by `_Then`."""

    def __init__(self) -> None:
        self.awaited = set(FOLLOWERS)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in self.awaited:
            return None
        self.awaited.remove(fullname)
        if not self.awaited:
            sys.meta_path.remove(self)
        spec: ModuleSpec | None = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Runs a module, then what follows it."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # So that whoever asks for the module's source or loader later finds the usual one.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(FOLLOWERS[module.__name__])


def register_when_imported() -> None:
    """Register eckart's quantizer with transformers, at once or as soon as transformers has a place for it.

    A second call does nothing.
    """
    if TABLE in sys.modules:
        for follower in FOLLOWERS.values():
            importlib.import_module(follower)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
