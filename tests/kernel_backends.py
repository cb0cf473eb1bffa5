"""Which backends of an op the tests run on the device in use."""

import pytest
from rwkv_kernels import dispatch


def on_this_device(backends):
    """Names of the backends that run here: kernels compiled where they can be, interpreted everywhere."""
    return [name for name, backend in backends.items() if not backend.why_not(dispatch.here())]


def beside_the_oracle(backends):
    """The same without the scan, which they are held against."""
    return [name for name in on_this_device(backends) if name != "scan"]


def interpreted(backends):
    """Those that an interpreter runs, which takes long: of its cases most are slow tests."""
    return [name for name in on_this_device(backends) if backends[name].by_name]


def each_case(backends, cases, quick=None):
    """Every case for every backend beside the oracle; slow ones are those not in `quick`, and for an interpreter most."""
    return [
        pytest.param(
            case,
            backend,
            marks=() if case in (quick or cases) and (backend not in slow or case in FEW) else pytest.mark.slow,
        )
        for slow in [interpreted(backends)]
        for backend in beside_the_oracle(backends)
        for case in cases
    ]


FEW = (
    "one_token",
    "ragged_end",
    "strongest_decay",
    "lengths_and_resets",
    "values_of_another_width",
    "more_keys_than_values",
)
