"""Mend Triton's interpreter, for processes in which it interprets kernels (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def mend() -> None:
    """Let the interpreter of Triton 3.9 run what compiles for GPUs; of older ones this changes nothing that our kernels give.

    It takes a comparison of two numbers, spread over a block, for int32, and refuses masks of int32. And it compares bfloat16 by
    its bits, as uint16.
    """
    binary_op = interpreter.InterpreterBuilder.binary_op

    def create_splat(self: Any, block_type: Any, number: Any) -> interpreter.TensorHandle:
        values = np.full(block_type.shape, np.ravel(number.data)[0], dtype=interpreter._get_np_dtype(block_type))
        return interpreter.TensorHandle(values, block_type.scalar)

    def compared(self: Any, left: Any, right: Any, operation: Callable) -> interpreter.TensorHandle:
        if operation in COMPARISONS and left.dtype.scalar == tl.bfloat16:
            left, right = (interpreter.TensorHandle((side.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for side in (left, right))
        return binary_op(self, left, right, operation)

    interpreter.InterpreterBuilder.create_splat = create_splat
    interpreter.InterpreterBuilder.binary_op = compared
