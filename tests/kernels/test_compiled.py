"""Every kernel compiles, forward and backward, for A100, H200 and TPU v5e, none of which is here."""

import pytest
from rwkv_kernels import compile_report, hardware

SPILLS = {"wkv4": 0, "wkv6": 1000, "wkv7": 1000}
"""Bytes a thread may spill with heads of 64: none where tokens are single numbers; see the table in kernels/README.md."""


@pytest.mark.aot
@pytest.mark.parametrize("case", compile_report.CASES, ids=lambda case: "-".join(map(str, case)))
def test_both_kernels_of_an_op_compile(case):
    if reason := hardware.why_not():
        pytest.skip(reason)
    rows = compile_report.report(case)
    assert [row["kernel"] for row in rows] == [f"{case.op}_forward", f"{case.op}_backward"]
    if case.target in hardware.GPUS and case.head_dim == 64:
        assert all(row["spilled_bytes"] <= SPILLS[case.op] for row in rows)
