"""What runs in JAX's interpreter of Mosaic GPU, which takes about half an hour, is a test on request: `pytest -m mosaic`."""

import jax
import pytest
from kernel_backends import SLOWEST


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("backend") == SLOWEST:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
            item.add_marker("mosaic")


@pytest.fixture
def x64():
    """float64 for the length of a test, in all threads: that interpreter calls back from others."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
