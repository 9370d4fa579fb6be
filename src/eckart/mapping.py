"""Tensors that lie in files, mapped into memory: the kernel can drop what was read of them and read it again."""

from __future__ import annotations

import ctypes
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

MAPPED_FROM = 1 << 20
"""Bytes from which memory comes from the kernel, and goes back to it, by itself; fewer are not worth a file."""
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


def mapped(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Move tensors to a file that is mapped into memory.

    Args:
        tensors: By name.
        file: Gets them, and appears whole; it must outlive what is returned. What is mapped from a file of this name
            stays as it is.

    Returns:
        The same, on the CPU, without memory of their own. Writing to them would give them some.
    """
    # Not in place: another file of this name may be mapped.
    part = file.with_suffix(".part")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, file)
    # The C library keeps what decompositions freed, in pieces: most of a gigabyte over 300 matrices.
    trim = _c_library("malloc_trim")
    if trim is not None:
        trim(0)
    return load_file(file)


def lent(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Move tensors to a file without a name: the disk has its space back as soon as no tensor is left, killed or not.

    Args:
        tensors: By name.
        folder: On the disk that lends the space.

    Returns:
        As of `mapped`.
    """
    descriptor, name = tempfile.mkstemp(suffix=".safetensors", dir=folder)
    os.close(descriptor)
    found = mapped(tensors, Path(name))
    with suppress(PermissionError):  # Windows keeps a file that is mapped
        os.unlink(name)
    return found


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor's numbers lie in memory of its own, not in a mapped file or in another library's.

    Args:
        tensor: On any device.

    Returns:
        Whether they do.
    """
    return tensor.untyped_storage().resizable()


def give_back_freed() -> None:
    """Let large pieces of memory go back to the kernel as soon as they are freed, for the rest of this process.

    The C library of Linux raises the size from which it does so up to 32 MiB, as it sees larger pieces freed; smaller
    ones stay between others, which holds hundreds of megabytes. Elsewhere nothing happens.
    """
    option = _c_library("mallopt")
    if option is not None:
        option(_MMAP_THRESHOLD, MAPPED_FROM)


def _c_library(function: str) -> ctypes._NamedFuncPointer | None:
    """A function of the C library, or None where it has none of this name."""
    return getattr(ctypes.CDLL(None), function, None) if os.name == "posix" else None
