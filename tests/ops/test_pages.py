"""Huge pages are asked for, and nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastd2o.ops.pages import in_huge_pages


def flags_at(address: int) -> list[str]:
    """The flags that the kernel keeps of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        head = line.split()[0]
        if "-" in head:
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that takes the advice")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_large_memory_is_asked_to_be_in_huge_pages():
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    middle = tensor.data_ptr() + (32 << 20)
    assert "hg" not in flags_at(middle)
    assert in_huge_pages(tensor) is tensor
    assert "hg" in flags_at(middle)


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_small_memory_is_left_alone(size: int):
    tensor = torch.arange(size)
    assert in_huge_pages(tensor) is tensor
    assert torch.equal(tensor, torch.arange(size))
