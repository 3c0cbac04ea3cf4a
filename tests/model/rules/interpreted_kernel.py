"""Run by test_kernel.py as a process of its own: flash-linear-attention's kernels on a CPU, by Triton's interpreter,
against our torch form in float64.

Triton decides for the interpreter when it is imported, hence the process. Four things stand in the way of these
kernels there (seen with triton 3.7.1 and fla-core 0.6.0), and are put right for this process alone:

- The autotuner times configurations, which needs a driver (`triton/runtime/autotuner.py`, `_bench`): it takes the
  first one instead.
- Loops over `range` count in Python's own numbers, on which the kernels call `.to` (`fla/ops/common/chunk_delta_h.py`,
  `i_t.to(tl.int64)`).
- bfloat16 is kept as uint16, and sums, products and matrix products compute with those integers
  (`triton/runtime/interpreter.py`, `binary_op`, `create_dot`, `ReduceOps.sum`).
- Rounding to bfloat16 truncates (`cast_impl`); a GPU rounds to nearest.

Prints one line of JSON per case: relative errors of the states and of every gradient, and kernel launches.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle

from model.rules.deltanet import scan_delta_rule
from model.rules.kernel import scan_by_fla
from tests.model.rules.kernel_cases import NAMES, gradients_of, relative_errors, scan_inputs

LAUNCHED: list[str] = []


class LoopNumber(int):
    def to(self, dtype: object) -> LoopNumber:
        return self


def loop_range(*bounds: object) -> map:
    return map(LoopNumber, range(*(int(bound) for bound in bounds)))


def widened(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(handle: TensorHandle) -> TensorHandle:
    rounded = torch.from_numpy(np.ascontiguousarray(handle.data, dtype=np.float32)).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits.reshape(handle.data.shape), tl.bfloat16)


def let_the_interpreter_know_bfloat16() -> None:
    cast, binary, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op, InterpreterBuilder.create_dot
    add_up = ReduceOps.sum

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return narrowed(cast(self, source, tl.float32))
        return cast(self, widened(source), target)

    def binary_op(self, left, right, operation):
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, operation)
        result = binary(self, widened(left), widened(right), operation)
        return result if result.data.dtype == bool else narrowed(result)

    def create_dot(self, left, right, *rest):
        return dot(self, widened(left), widened(right), *rest)

    def reduce_sum(self, x):
        if x.dtype.scalar != tl.bfloat16:
            return add_up(self, x)
        total = add_up(self, tl.core.tensor(widened(x.handle), tl.block_type(tl.float32, x.shape)))
        kind = tl.block_type(tl.bfloat16, total.shape) if total.shape else tl.bfloat16
        return tl.core.tensor(narrowed(total.handle), kind)

    InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op = cast_impl, binary_op
    InterpreterBuilder.create_dot, ReduceOps.sum = create_dot, reduce_sum
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(InterpreterBuilder, f"create_{name}", cast_impl)


def prepare() -> None:
    Autotuner._bench = lambda self, *arguments, config, **options: 0.0
    Autotuner.check_disk_cache = lambda self, key, configs, measure: measure()
    let_the_interpreter_know_bfloat16()
    run = InterpretedFunction.run

    def counted(self, *arguments, **options):
        LAUNCHED.append(self.fn.__name__)
        return run(self, *arguments, **options)

    InterpretedFunction.run = counted
    import fla.ops.gated_delta_rule  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.__dict__["range"] = loop_range


def main() -> None:
    assert interpreter  # Triton has been imported for the interpreter
    prepare()
    for line in sys.stdin:
        case = json.loads(line)
        inputs, reset = scan_inputs(case["shape"], decay=case["decay"], gate=case["gate"], resets=case["resets"])
        expected = gradients_of(scan_delta_rule, inputs, reset, torch.float64)
        LAUNCHED.clear()
        products = getattr(torch, case["products"])

        def scan(*arguments, products=products):
            return scan_by_fla(*arguments, products=products)

        found = gradients_of(scan, inputs, reset, torch.float32)
        assert all(x is None or x.dtype == torch.float32 for x in found), "states and gradients are float32"
        errors = dict(zip(("states", *NAMES), relative_errors(found, expected), strict=True))
        print(json.dumps({"errors": errors, "launches": len(LAUNCHED)}), flush=True)


if __name__ == "__main__":
    main()
