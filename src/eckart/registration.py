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


class _Finder(MetaPathFinder):
    """Finds that one module as Python would, and has it run by `_Then`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec: ModuleSpec | None = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Runs a module, then registers the quantizer in it."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # So that whoever asks for the module's source or loader later finds the usual one.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


def register_when_imported() -> None:
    """Register eckart's quantizer with transformers, at once or as soon as transformers has a place for it.

    A second call does nothing.
    """
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # That module registers itself at its end; it may be what imported transformers, and half done.
    importlib.import_module("eckart.quantizer")
    importlib.import_module("eckart.elastic")
