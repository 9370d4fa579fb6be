"""What a long computation has finished, kept by name so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from eckart.errors import OutputError
from eckart.mapping import MAPPED_FROM, lent
from eckart.results import read_json, to_json, write_text


class Spill:
    """What is finished: tensors and lists of numbers by name, in a folder or in memory."""

    def __init__(self, folder: Path | None):
        """Open a folder, which is made where it is missing."""
        self.folder = folder
        self.about: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._numbers: dict[str, Any] = {}

    def check(self, about: dict[str, Any]) -> None:
        """Refuse a folder that holds other work, and take up what this one finished.

        Raises:
            OutputError: It was begun with other weights, text, settings or code.
        """
        self.about = about
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "about.json"
        if path.exists():
            before = read_json(path)
            differing = [name for name in about if before.get(name) != about[name]]
            if differing:
                raise OutputError(
                    f"{self.folder} holds unfinished work with other {', '.join(differing)}. "
                    "Work goes on only where nothing changed. Choose another --out, or remove the folder."
                )
        else:
            write_text(path, to_json(about))
        numbers = self.folder / "numbers.json"
        self._numbers = read_json(numbers) if numbers.exists() else {}

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Give tensors that were kept, mapped from their file; None where there are none."""
        if self.folder is None:
            return self._tensors.get(name)
        path = self._path(name)
        return load_file(path) if path.exists() else None

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors; the file appears whole."""
        if self.folder is None:
            self._tensors[name] = tensors
            return
        path = self._path(name)
        part = path.with_suffix(".part")
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, part)
        os.replace(part, path)

    def lend(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move large tensors on the CPU to the folder's disk for as long as they are used, if there is one."""
        size = sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type == "cpu")
        return tensors if self.folder is None or size < MAPPED_FROM else lent(tensors, self.folder)

    def numbers(self, name: str) -> Any:
        """Give numbers that were kept, or None."""
        return self._numbers.get(name)

    def note(self, name: str, numbers: Any) -> None:
        """Keep numbers."""
        self._numbers[name] = numbers
        if self.folder is not None:
            write_text(self.folder / "numbers.json", json.dumps(self._numbers))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"
