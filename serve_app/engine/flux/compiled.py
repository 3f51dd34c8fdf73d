"""The transformer's blocks compiled by torch, each kind once for each size of window: regional compilation.

A block's graphs serve every other block of its kind. What is computed differs from eager by rounding. What was compiled
is kept by `compile_cache`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from ...errors import VariantLoadFailed

#: Of one kind of block: torch's own cap on a function's graphs, and room for 128 sizes of two. With its default limit,
#: 8, the fifth size would be an error.
_MAX_GRAPHS = 256


def compile_blocks(transformer: Any) -> None:
    """Each size is compiled when it is first run.

    As the transformer's own `compile_repeated_blocks` does, but within the hooks of step caching, not around them: they
    decide step by step, in Python, and a graph that held them would break there.
    """
    for module in transformer.modules():
        if type(module).__name__ in transformer._repeated_blocks:
            module.forward = torch.compile(  # type: ignore[call-overload]  # its overloads forget recompile_limit
                module.forward, fullgraph=True, dynamic=False, recompile_limit=_MAX_GRAPHS
            )


def graphs() -> int:
    """Graphs compiled in this process so far, or taken from its cache: three for each size. The first single block has
    one of its own, because its input lies otherwise in memory."""
    return int(counters["stats"]["unique_graphs"])


@contextmanager
def translated() -> Iterator[None]:
    """Raises VariantLoadFailed, with the compiler's reason, for blocks that do not compile."""
    try:
        yield
    except TorchDynamoException as e:
        raise VariantLoadFailed(f"the variant's blocks do not compile: {e}") from e
