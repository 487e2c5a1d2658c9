"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessella import _native


def _has_cuda_kernels() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("tessella::act_quant", "CUDA")


def pytest_collection_modifyitems(items):
    """GPU tests skip, with a reason, where there is no GPU or no CUDA build."""
    reason = None
    if not torch.cuda.is_available():
        reason = "needs a CUDA GPU"
    elif not (_native.HAS_OPS and _has_cuda_kernels()):
        reason = "needs a build with CUDA"
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A checkpoint of an untied tiny Llama; tests that damage it work on a copy."""
    import tiny  # transformers, which many tests do without

    path = tmp_path_factory.mktemp("llama")
    tiny.save(path, "llama")
    return path


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator: every test draws the same numbers on every run."""
    return torch.Generator().manual_seed(20250131)


@pytest.fixture
def threads():
    """Sets torch's thread count and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
