"""Passes over tensors in the processor's own memory: magnitudes counted, squares summed, products flushed as XLA does.

NumPy does the arithmetic, on memory that is torch's. Chunks fit the cache, so that nothing but the tensors themselves
comes from memory. torch's own operations would share each chunk out among threads and wait for them, which on a busy
machine takes several times as long as the work; here each thread takes a piece when it is done with its last.
``altgrad_jax`` needs nothing of the kind: XLA fuses the passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CHUNK = 1 << 15
"""Elements that are widened at a time, and more than squares are added up in a row before a tensor's pieces are. torch,
too, shares nothing out up to this size."""

CHUNK_OF_ONE_THREAD = 1 << 17
"""Elements that torch's own operations are best given at a time, one operation after another, if none is shared out."""

_ROW = 1 << 12
"""Elements of one dot product: OpenBLAS shares out those of more than 10,000."""

_PIECE = 1 << 20
"""Elements that a thread takes at a time, of contiguous tensors. Less than two of them are not worth a thread."""

_COUNTED, _SQUARED = 1 << 17, 1 << 18
"""Elements that are counted at a time where they lie, or brought to float64: 1.2 and 2 MB with what is made of them.
Fewer would fit a nearer cache, but after each operation a thread has to get Python's lock back from the others."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INF = np.uint32(0x7F800000)

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


def is_plain(tensor: Tensor, kind: str = "cpu") -> bool:
    """Whether a tensor's memory is this kind of device's, holds its elements as they are and may be read now.

    It may not while torch records what is done to tensors or does it to others instead: compiling, in ``torch.func``'s
    transforms, under a ``TorchDispatchMode``.
    """
    types = (Tensor, torch.nn.Parameter)
    return type(tensor) in types and tensor.device.type == kind and tensor.layout == torch.strided and _nobody_watches()


def under_transforms() -> bool:
    """Whether a transform of ``torch.func`` is on, under which a tensor may have more dimensions than it shows.

    torch tells so in private alone. A version that does not tell is taken for one in which it is: slower, not wrong.
    """
    innermost = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: "unknown")
    return innermost() is not None


def _nobody_watches() -> bool:
    """Whether what is done to a tensor is done to its memory and to nothing else; told in private alone, too."""
    modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: -1)
    earlier_modes = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", lambda: -1)
    return not under_transforms() and modes() == 0 and earlier_modes() == 0


@torch.no_grad()
def sums_of_squares(tensors: Sequence[Tensor]) -> list[float]:
    """The sum of squares of each tensor, in float64: of n elements no more than n - 1 roundings in a row.

    Args:
        tensors: floating point, each one :func:`is_plain`.

    >>> sums_of_squares([torch.tensor([3.0, 4.0]), torch.full((2,), 2.0**-149)])
    [25.0, 3.92...e-90]
    """
    in_order = [_in_order(each.detach()).reshape(-1) for each in tensors]
    pieces = [(k, piece) for k, each in enumerate(in_order) for piece in each.split(_PIECE)]
    sums = [0.0] * len(tensors)
    # In one order, since processes that hold the same tensor have to find the same sum, whichever thread was first.
    for k, value in sorted(_shared_out(_numbered_sum_of_squares, pieces, _size_of(tensors))):
        sums[k] += value
    return sums


class MagnitudeCounts(NamedTuple):
    """How many magnitudes are what, as bits of float32; see :func:`count_magnitudes`.

    Attributes:
        large: those from a limit up, infinities with them.
        zero: those that are zero.
        small: those up to a limit, zeros with them.
        nan: those of NaN, which are in no other.
        largest: the bits of the largest, NaN the largest of all; 0 of nothing.
    """

    large: int
    zero: int
    small: int
    nan: int
    largest: int


def count_magnitudes(x: Tensor, large: int, small: int) -> MagnitudeCounts:
    """Count the magnitudes of elements, as bits of float32, beyond two limits.

    Args:
        x: float32, bfloat16 or float16 of any strides, :func:`is_plain`.
        large: the smallest that counts as large, at most that of infinity.
        small: the largest that counts as small, less than that of infinity.

    >>> one = 0x3F800000
    >>> count_magnitudes(torch.tensor([2.0, -1.0, 0.5, 0.0, float("nan")]), large=one, small=one - 1)
    MagnitudeCounts(large=2, zero=1, small=2, nan=1, largest=2143289344)
    """
    flat = _in_order(x.detach())
    pieces = list(_parts(flat.view(-1) if flat.is_contiguous() else flat, _PIECE))
    counted = _shared_out(lambda piece: _count_magnitudes(piece, np.uint32(large), np.uint32(small)), pieces, x.numel())
    return MagnitudeCounts(
        large=sum(each.large for each in counted),
        zero=sum(each.zero for each in counted),
        small=sum(each.small for each in counted),
        nan=sum(each.nan for each in counted),
        largest=max(each.largest for each in counted),
    )


def can_multiply(tensor: Tensor) -> bool:
    """Whether :func:`multiply_` takes this tensor, on this processor."""
    return (
        is_plain(tensor)
        and tensor.dtype == torch.float32
        and not tensor.is_neg()
        and _in_order(tensor).is_contiguous()
        and _FLUSHES_LIKE_XLA
    )


@torch.no_grad()
def multiply_(tensors: Sequence[Tensor], factor: np.float32) -> None:
    """Multiply tensors in place by a factor. What rounds to less than 2^-126, or was less, becomes zero of its sign.

    Args:
        tensors: each one :func:`can_multiply`. One that comes twice is multiplied twice.
        factor: any float32.

    >>> values = torch.tensor([3.0, -(2.0**-126)])
    >>> multiply_([values], np.float32(0.5))
    >>> values.tolist()
    [1.5, -0.0]
    """
    arrays = [shared_array(piece) for each in tensors for piece in _in_order(each.detach()).view(-1).split(_PIECE)]
    size = 0 if _overlap(tensors) else _size_of(tensors)
    _shared_out(lambda array: np.multiply(array, factor, out=array), arrays, size, flushing=True)
    # What NumPy writes to torch's memory, autograd does not see.
    torch.autograd.graph.increment_version(list(tensors))


def shared_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor's memory as an array. Not by ``numpy()``, after which FSDP could never free that memory again.

    >>> tensor = torch.zeros(2)
    >>> shared_array(tensor)[0] = 1.0
    >>> tensor.tolist(), tensor.untyped_storage().resizable()
    ([1.0, 0.0], True)
    """
    return np.from_dlpack(tensor)


def _in_order(tensor: Tensor) -> Tensor:
    """A view with the axes in the order of memory: contiguous if the elements lie side by side, in whatever order."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def _parts(whole: Tensor, size: int) -> Iterator[Tensor]:
    """Views of at most so many elements, cut along the outermost axes; in them every element comes once."""
    if whole.numel() <= size:
        yield whole
        return
    rows = size * len(whole) // whole.numel()
    for part in whole.split(rows) if rows else whole.unbind():
        yield from _parts(part, size)


def _size_of(tensors: Sequence[Tensor]) -> int:
    return sum(each.numel() for each in tensors)


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether any element of contiguous tensors is also one of another, so that threads would meet at it."""
    spans = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors if each.numel())
    return any(end > start for (_, end), (start, _) in pairwise(spans))


def _numbered_sum_of_squares(numbered: tuple[int, Tensor]) -> tuple[int, float]:
    number, piece = numbered
    return number, _sum_of_squares(piece)


def _sum_of_squares(piece: Tensor) -> float:
    array = _as_array(piece)
    size = min(_SQUARED, max(1, -(-array.size // _ROW)) * _ROW)
    chunk = np.empty((size // _ROW, _ROW))
    line, whole = chunk.reshape(-1), array.size // size
    sums = np.zeros((whole + 1, len(chunk)))
    for values, into in zip(array[: whole * size].reshape(whole, size), sums, strict=False):
        np.copyto(line, values)
        np.vecdot(chunk, chunk, into)
    rest = array.size - whole * size
    rows = -(-rest // _ROW)
    line[:rest], line[rest : rows * _ROW] = array[whole * size :], 0
    np.vecdot(chunk[:rows], chunk[:rows], sums[whole, :rows])
    return float(sums.sum())


def _count_magnitudes(piece: Tensor, large: np.uint32, small: np.uint32) -> MagnitudeCounts:
    """In four passes over a chunk; of those that only what is rare needs, most chunks need none."""
    size = min(_COUNTED, piece.numel())
    scratch, flags = np.empty(size, np.uint32), np.empty(size, np.bool_)
    larges = zeros = smalls = nans = largest = 0
    for bits in _chunks_of_bits(piece):
        flag = flags[: bits.size]
        magnitude = np.bitwise_and(bits, _MAGNITUDE, scratch[: bits.size])
        here = int(np.maximum.reduce(magnitude, initial=0))
        largest = max(largest, here)
        up_to = int(np.count_nonzero(np.less_equal(magnitude, small, flag)))
        if up_to:
            smalls += up_to
            zeros += bits.size - int(np.count_nonzero(magnitude))
        if here >= large:
            larges += int(np.count_nonzero(np.greater_equal(magnitude, large, flag)))
        if here > _INF:
            nans += int(np.count_nonzero(np.greater(magnitude, _INF, flag)))
    return MagnitudeCounts(larges - nans, zeros, smalls, nans, largest)


def _chunks_of_bits(piece: Tensor) -> Iterator[npt.NDArray[np.uint32]]:
    """The elements as bits of float32: where they lie, if they are that and lie side by side, and else copied."""
    if piece.dtype == torch.float32 and piece.is_contiguous() and not piece.is_neg():
        bits = shared_array(piece).reshape(-1).view(np.uint32)
        yield from (bits[start : start + _COUNTED] for start in range(0, bits.size, _COUNTED))
        return
    scratch = torch.empty(min(CHUNK, piece.numel()), dtype=torch.float32, device="cpu")
    for part in _parts(piece, CHUNK):
        scratch[: part.numel()].view(part.shape).copy_(part)
        yield scratch[: part.numel()].numpy().view(np.uint32)


def _as_array(piece: Tensor) -> npt.NDArray[Any]:
    """The elements, in memory that is shared if NumPy has the type and else as float32."""
    piece = piece.resolve_neg()
    if piece.dtype in (torch.float32, torch.float64):
        return shared_array(piece)
    wide = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
    for into, values in zip(wide.split(CHUNK), piece.split(CHUNK), strict=True):
        into.copy_(values)
    return wide.numpy()


def _shared_out(
    function: Callable[[_Piece], _Result], pieces: Sequence[_Piece], size: int, *, flushing: bool = False
) -> list[_Result]:
    """Results of a function that lets go of Python's lock, in no order: on as many threads as torch uses.

    Args:
        function: of one piece.
        pieces: what there is to do.
        size: elements in all, which tell whether threads are worth while.
        flushing: whether the processor is to flush subnormals meanwhile.
    """
    waiting = deque(pieces)

    def work() -> list[_Result]:
        with np.errstate(all="ignore"):
            return [function(piece) for piece in _taken_from(waiting)]

    threads = min(torch.get_num_threads(), size // _PIECE)
    if threads < 2:
        with while_flushing(flushing):
            return work()
    # To flush is a switch of each thread, and theirs ends with them.
    with ThreadPoolExecutor(threads, initializer=torch.set_flush_denormal, initargs=(flushing,)) as pool:
        return [each for future in [pool.submit(work) for _ in range(threads)] for each in future.result()]


def _taken_from(waiting: deque[_Piece]) -> Iterator[_Piece]:
    while True:
        try:
            yield waiting.popleft()
        except IndexError:
            return


@contextmanager
def while_flushing(flushing: bool) -> Iterator[None]:
    """While inside, this thread flushes subnormals, if it is to; it did before if a subnormal reads as zero."""
    if not flushing or not _subnormal() * np.float32(1):
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _subnormal() -> np.float32:
    return np.uint32(1 << 22).view(np.float32)


def _flushes_like_xla() -> bool:
    """Whether a processor that was told to flush takes for zero what is below 2^-126 once it is rounded.

    x86 does; ARM looks before it rounds.
    """
    smallest = np.full(32, 2.0**-126, np.float32)
    near, below = np.nextafter(smallest, np.float32(1)), np.full(32, _subnormal())
    rounded_up = np.float32(1 - 2.0**-23)
    with while_flushing(True):
        kept, flushed = near * rounded_up, np.concatenate([smallest * np.float32(0.75), below * np.float32(1)])
    return bool((kept == smallest).all() and not flushed.view(np.uint32).any())


_FLUSHES_LIKE_XLA = _flushes_like_xla()
