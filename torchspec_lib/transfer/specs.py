"""What a store records of a sample's tensors: names, shapes and dtypes."""

from collections.abc import Mapping

import torch

from torchspec_lib.types import TensorSpec

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
}
"""The dtypes that a sample may hold, by the name in ``TensorSpec``."""


def describe(tensors: Mapping[str, torch.Tensor]) -> tuple[int, dict[str, TensorSpec]]:
    """The number of tokens that all ``tensors`` [T, ...] share, and the spec of each.

    Raises:
        ValueError: The first dimensions differ, or a dtype isn't one that samples hold.

    Example:
        >>> describe({"input_ids": torch.zeros(5, dtype=torch.int32)})
        (5, {'input_ids': TensorSpec(shape=(5,), dtype='int32')})
    """
    specs = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} is {dtype}; a sample holds {', '.join(DTYPES)}")
        specs[name] = TensorSpec(tuple(tensor.shape), dtype)
    lengths = {spec.shape[:1] for spec in specs.values()}
    if len(lengths) != 1 or lengths == {()}:
        shapes = {name: spec.shape for name, spec in specs.items()}
        raise ValueError(f"a sample's tensors share their first dimension, not so {shapes}")
    ((num_tokens,),) = lengths
    return num_tokens, specs
