"""Both paths, both ways of threading, and a look at what the direct kernel is given."""

import pytest

from labkit.hardware import set_fast
from labkit.quant.kernels import operations, threads


@pytest.fixture(params=["fast", "reference"])
def path(request):
    set_fast(request.param == "fast")
    yield request.param
    set_fast(True)


@pytest.fixture
def products(monkeypatch):
    """Shapes of what the kernel that multiplies was given."""
    shapes, original = [], operations.multiply_4bit

    def spy(x, *arguments):
        shapes.append(tuple(x.shape))
        return original(x, *arguments)

    monkeypatch.setattr(operations, "multiply_4bit", spy)
    return shapes


@pytest.fixture(params=["openmp", "pool"])
def threading_by(request, monkeypatch):
    """Once on PyTorch's OpenMP threads, where there are any, and once on Python's."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", None)
    elif threads._openmp is None:
        pytest.skip("PyTorch's OpenMP runtime is not found here: kernels run on Python threads")
    return request.param
