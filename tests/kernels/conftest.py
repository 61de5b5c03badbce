"""The instruction sets of the compiled kernels."""

from __future__ import annotations

import pytest

from tensorpress.kernels import cpu_linear


@pytest.fixture(autouse=True)
def every_thread():
    """The small layers of tests are worth one thread: here they are spread over all that are asked for."""
    if cpu_linear.compiled() is None:
        yield
        return
    cpu_linear.limit_threads(0)
    yield
    cpu_linear.limit_threads()


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
