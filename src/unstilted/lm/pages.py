"""Memory of weight files that are mapped: given back once their content has been copied."""

import ctypes
import sys
from mmap import PAGESIZE
from pathlib import Path

from torch import Tensor

DONT_NEED = 4  # MADV_DONTNEED of <sys/mman.h>


def give_back(tensor: Tensor) -> None:
    """Let Linux drop the pages of a weight file that `tensor` is mapped from; reading it again would fetch them from the file.

    safetensors keeps the whole file mapped while any tensor of it lives, so without this a copied weight would count twice. Nothing
    happens elsewhere, nor to memory that isn't a file's.
    """
    if sys.platform != "linux":
        return
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    first, last = -(-start // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE
    if first < last and _is_weight_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED)


def _is_weight_file(start: int, end: int) -> bool:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith(".safetensors"):
            low, high = (int(address, 16) for address in line.split()[0].split("-"))
            if low <= start and end <= high:
                return True
    return False
