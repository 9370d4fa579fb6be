"""Tensors in files: the same numbers, no memory of their own, and memory that goes back when it is freed."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eckart.mapping import has_memory, lent, mapped

FREED = """
from pathlib import Path
import torch
from eckart.mapping import give_back_freed

def held():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

give_back_freed()
torch.ones(20 << 20, dtype=torch.uint8)  # unasked, the C library would keep smaller pieces from here on
before = held()
large, small = [], []
for _ in range(32):
    large.append(torch.ones(4 << 20, dtype=torch.uint8))
    small.append(torch.ones(64 << 10, dtype=torch.uint8))
between = held()
large.clear()
print(between - before, held() - before)
"""


def test_what_is_mapped_is_the_same_and_another_file_of_the_name_leaves_it_so(tmp_path):
    first, second = torch.randn(5, 7), torch.randn(7, 5).T
    one = mapped({"weight": first, "order": torch.arange(3)}, tmp_path / "it.safetensors")
    two = mapped({"weight": second}, tmp_path / "it.safetensors")
    assert torch.equal(one["weight"], first)
    assert torch.equal(one["order"], torch.arange(3))
    assert torch.equal(two["weight"], second)
    assert [path.name for path in tmp_path.iterdir()] == ["it.safetensors"]


def test_what_is_lent_is_the_same_without_memory_of_its_own_and_no_file_is_left(tmp_path):
    weight = torch.randn(64, 33)
    found = lent({"weight": weight}, tmp_path)["weight"]
    assert torch.equal(found, weight)
    assert not any(tmp_path.iterdir())
    assert has_memory(weight)
    assert not has_memory(found)
    assert has_memory(found.clone())


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt") or not Path("/proc/self/status").exists(),
    reason="the C library of Linux",
)
def test_large_pieces_go_back_when_they_are_freed_though_small_ones_between_them_stay():
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)  # noqa: S603
    taken, left = map(int, run.stdout.split())
    assert taken > 128 << 20
    assert left < 16 << 20
