"""The instruction sets of the compiled kernels."""

from __future__ import annotations

import pytest

from tensorpress.kernels import cpu_linear


@pytest.fixture(params=["avx512", "avx2", "portable"])
def level(request):
    """Each instruction set that this machine has."""
    cpu_linear.limit_instructions(request.param)
    try:
        if cpu_linear.instructions() != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        cpu_linear.limit_instructions("avx512")
