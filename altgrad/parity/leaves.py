"""The named tensors of a tree, in NumPy: of JAX arrays, torch tensors, NumPy arrays and numbers, bits unchanged.

Neither framework is imported: a tensor of one can only be there if its owner has imported it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from altgrad.parity.floats import Array, is_exact, is_float
from altgrad.parity.operation import Made, Operation
from altgrad_core.errors import InputError

if TYPE_CHECKING:
    import jax
    import torch

_EXPECTED = "expected trees of JAX arrays, torch tensors, NumPy arrays and numbers"


@dataclass(frozen=True)
class Leaf:
    """A tensor of a tree.

    Attributes:
        array: its values, in NumPy or ml_dtypes' dtype of the same name.
        operation: what made it, if the tree says so.
    """

    array: Array
    operation: Operation | None = None


def named_tensors(tree: object) -> dict[str, Leaf]:
    """The tensors of a tree by their paths, in the tree's own order.

    A path is made of keys, indices and field names with dots between, as in a torch state_dict: the kernel in
    ``{"dense": {"kernel": x}}`` is ``dense.kernel``. None is no tensor; a bare tensor's path is empty.

    Args:
        tree: mappings, lists, tuples, named tuples, dataclasses, what else JAX knows as a tree, ``nnx.State``,
            ``nnx.Module`` and ``torch.nn.Module`` (its state_dict), to any depth.

    Raises:
        InputError: for a leaf that is no tensor, or a sparse one or one on the meta device of torch, for complex
            numbers, and where two paths read alike.

    >>> {
    ...     name: leaf.array.dtype.name
    ...     for name, leaf in named_tensors({"a": [np.float32(1), {"b": 2.0}], "c": None}).items()
    ... }
    {'a.0': 'float32', 'a.1.b': 'float64'}
    """
    found: dict[str, Leaf] = {}
    for path, leaf in _walk(tree, (), None):
        name = ".".join(path)
        if name in found:
            raise InputError(f"two tensors have the path {name!r}; expected keys that tell them apart")
        found[name] = leaf
    return found


def as_array(tensor: object, name: str = "") -> Array:
    """A tensor of either framework, or a number, as a NumPy array with the same bits.

    Args:
        tensor: of any shape; on any device.
        name: of the tensor, for the message.

    Raises:
        InputError: if it is no tensor of real numbers, or a torch tensor that does not hold each element: a sparse or
            nested one, or one on the meta device.
    """
    array = _as_numpy(tensor, name)
    if array is None:
        raise InputError(f"{name or 'the tree'} holds {tensor!r:.80}, a {type(tensor).__name__}; {_EXPECTED}")
    if array.dtype.kind == "c" or "complex" in array.dtype.name:
        raise InputError(f"{name or 'the tensor'} is {array.dtype}; expected real numbers: compare real and imag apart")
    if not is_float(array.dtype) and not is_exact(array.dtype):
        raise InputError(f"{name or 'the tensor'} has the dtype {array.dtype}; {_EXPECTED}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _walk(node: object, path: tuple[str, ...], made: Operation | None) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    if node is None:
        return
    if isinstance(node, Made):
        yield from _walk(node.value, path, node.operation)
        return
    children = _children(node)
    if children is None:
        yield path, Leaf(as_array(node, ".".join(path)), made)
        return
    if made is not None:
        raise InputError(f"{'.'.join(path)!r} is said to be made by {made.name}, but is no single tensor")
    for key, child in children:
        yield from _walk(child, path if key is None else (*path, key), None)


def _children(node: object) -> list[tuple[str | None, object]] | None:
    """One level of a tree, None for a leaf; a child without a key takes its parent's path."""
    if isinstance(node, (np.ndarray, np.generic, bool, int, float, complex, str, bytes)) or _is_torch_tensor(node):
        return None
    opened = _opened(node)
    if opened is not None:
        return [(None, opened)]
    if isinstance(node, Mapping):
        return [(str(key), child) for key, child in node.items()]
    fields = getattr(node, "_fields", None)
    if isinstance(node, tuple) and fields:
        return [(str(name), child) for name, child in zip(fields, node, strict=True)]
    if isinstance(node, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(node)]
    registered = _children_by_jax(node)
    if registered is None and dataclasses.is_dataclass(node):
        return [(each.name, getattr(node, each.name)) for each in dataclasses.fields(node)]
    return registered


def _opened(node: object) -> object | None:
    """What a framework's own container holds: the state of a module, the value of a variable."""
    torch, nnx = sys.modules.get("torch"), sys.modules.get("flax.nnx")
    if torch is not None and isinstance(node, torch.nn.Module):
        return node.state_dict()
    if nnx is not None and isinstance(node, nnx.Module):
        return nnx.state(node)
    if nnx is not None and isinstance(node, nnx.Variable):
        return node.get_value()
    return None


def _children_by_jax(node: object) -> list[tuple[str | None, object]] | None:
    """One level of what is registered with JAX as a tree; None if it is not, or JAX is not there."""
    jax = sys.modules.get("jax")
    if jax is None or isinstance(node, jax.Array):
        return None
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda each: each is not node)
    if len(pairs) == 1 and pairs[0][1] is node:
        return None
    return [(jax.tree_util.keystr(path, simple=True, separator="."), child) for path, child in pairs]


def _as_numpy(tensor: object, name: str) -> Array | None:
    if isinstance(tensor, (np.ndarray, np.generic, bool, int, float, complex)):
        return np.asarray(tensor)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return _from_torch(tensor, name)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(tensor, jax.Array):
        return _from_jax(tensor)
    return None


def _is_torch_tensor(node: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(node, torch.Tensor)


def _from_torch(tensor: torch.Tensor, name: str) -> Array:
    what = _without_values(tensor)
    if what:
        raise InputError(f"{name or 'the tensor'} is {what}")
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor: all shards
    torch = sys.modules["torch"]
    tensor = tensor.detach().cpu()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not hasattr(ml_dtypes, dtype):
        return tensor.numpy()
    integers = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
    return tensor.view(integers).numpy().view(np.dtype(getattr(ml_dtypes, dtype)))


def _without_values(tensor: torch.Tensor) -> str:
    """What a torch tensor is that does not hold each of its elements, and what was expected; empty if it does."""
    torch = sys.modules["torch"]
    if tensor.is_meta:
        return "on the meta device, where tensors have no values; expected it on another"
    if tensor.is_nested:
        return "a nested tensor; expected a plain one, as to_padded_tensor or values gives"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({tensor.layout}); expected a dense one, as to_dense gives"
    return ""


def _from_jax(array: jax.Array) -> Array:
    jax = sys.modules["jax"]
    is_key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array)
