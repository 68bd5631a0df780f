"""Where tensors lie: addresses, the bytes they span, and which of them share bytes."""

from __future__ import annotations

import copy
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The bytes [begin, end) that a tensor touches."""

    begin: int
    end: int
    name: str


def span(name: str, tensor: Tensor) -> Span:
    """The span of a tensor that has elements."""
    begin = address(tensor)
    return Span(begin, begin + extent(tensor) * tensor.element_size(), name)


def overlaps(spans: Iterable[Span]) -> Iterator[tuple[Span, Span]]:
    """Pairs of spans that share bytes, in order of address.

    Each span that overlaps earlier ones comes once, paired with the one of them that reaches farthest; so every span
    that overlaps another is in some pair.
    """
    farthest = None
    for each in sorted(spans):
        if farthest and each.begin < farthest.end:
            yield farthest, each
        if farthest is None or each.end > farthest.end:
            farthest = each


class Apart:
    """Spans that share no bytes, so that some can be replaced without a look at all the others.

    Args:
        spans: by number; all of them share no bytes.
    """

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self._begin = array("Q", [begin for begin, _ in spans])  # by number
        ordered = sorted(spans)
        self._begins = array("Q", [begin for begin, _ in ordered])
        self._ends = array("Q", [end for _, end in ordered])

    @classmethod
    def of(cls, spans: Sequence[Span], tensors: Iterable[Tensor]) -> Apart | None:
        """None where some of the spans share bytes, or are not of memory."""
        if not all(map(has_address, tensors)) or next(overlaps(spans), None):
            return None
        return cls([(begin, end) for begin, end, _ in spans])

    def replaced(self, new: dict[int, Span]) -> Apart | None:
        """With other spans under these numbers; None where some would share bytes."""
        other = copy.copy(self)
        other._begin, other._begins, other._ends = self._begin[:], self._begins[:], self._ends[:]
        for number in new:
            at = bisect_left(other._begins, self._begin[number])
            del other._begins[at], other._ends[at]
        for number, (begin, end, _) in new.items():
            at = bisect_left(other._begins, begin)
            if (at > 0 and other._ends[at - 1] > begin) or (at < len(other._begins) and other._begins[at] < end):
                return None
            other._begin[number] = begin
            other._begins.insert(at, begin)
            other._ends.insert(at, end)
        return other


def place(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for tensors that are the same elements."""
    return (address(tensor), tensor.dtype, tensor.shape, tensor.stride())


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; a unique number for tensors that have no address."""
    return tensor.data_ptr() if has_address(tensor) else id(tensor) << 64


def has_address(tensor: Tensor) -> bool:
    """Whether data_ptr() is an address. For other tensors it raises, or means nothing."""
    return tensor.device.type in ("cpu", "cuda") and tensor.layout is torch.strided and not is_functorch(tensor)


def storage(tensor: Tensor) -> int:
    """Where the storage of a tensor begins."""
    return tensor.untyped_storage().data_ptr()


def extent(tensor: Tensor) -> int:
    """The number of elements from the first to one past the last, for a tensor that has any."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of the tensor may share memory, as in one that was expanded."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def is_functorch(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def nth_average(first: Tensor, stride: int, k: int) -> Tensor:
    """Average number `k` of several averages of one tensor, `stride` elements from one to the next."""
    return first.detach().as_strided(first.shape, first.stride(), first.storage_offset() + k * stride)
