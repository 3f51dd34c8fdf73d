"""What the CPU that the tests run on can do."""

import pytest
import torch

from benchmarks.comparison import number_type

HAS_BFLOAT16 = number_type.of(torch.device("cpu")) == torch.bfloat16
#: One of two cases runs: the number type that the benchmark computes in here.
own_number_type = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            torch.bfloat16, marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU only emulates bfloat16")
        ),
        pytest.param(torch.float32, marks=pytest.mark.skipif(HAS_BFLOAT16, reason="this CPU multiplies bfloat16")),
    ],
    ids=["bfloat16 where the CPU multiplies it", "float32 where it does not"],
)
