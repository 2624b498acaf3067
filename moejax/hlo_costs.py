"""What a compiled XLA program multiplies and moves through memory, by its text; see `hlo.py`."""

import dataclasses
import math
import re
from collections.abc import Iterator

from moejax.hlo import Instruction, Program, Run, called, dims, nbytes

ENDLESS = 10**14  # what XLA writes for cycles that it does not know is above this


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an instruction costs over all its runs.

    Attributes:
        scope: see `Program.scope`.
        flops: of products; of a kernel what it is said to have, and of the attention kernel, which
            does not say, what a causal half of its scores needs: more than a window. A TPU's
            products are convolutions, batched ones over a dilated dimension, a GPU's are calls of
            cuBLAS.
        kernel: whether it is a kernel, which XLA estimates no cycles for.
        memory_bytes: read from and written to the device's memory: outside a fusion the operands
            and the result. Of an operand that is only sliced the slices count, of a result that is
            an operand with a slice replaced the slice. What a TPU keeps on the chip does not count.
        cycles: that a TPU's compiler estimates.
    """

    scope: str
    flops: int
    kernel: bool
    memory_bytes: int
    cycles: int


def costs(program: Program, unknown_trips: int = 0) -> Iterator[Cost]:
    """Yields what the instructions of a program cost, those that cost nothing left out."""
    for run in program.runs(unknown_trips):
        flops, kernel = _flops(run)
        moved, cycles = _memory_bytes(program, run), _cycles(run)
        if flops or moved or cycles:
            times = run.times
            yield Cost(program.scope(run), times * flops, kernel, times * moved, times * cycles)


def matmul_flops(program: Program, unknown_trips: int = 0) -> int:
    """Returns the FLOPs of a program's products and kernels; see `Cost`."""
    return sum(cost.flops for cost in costs(program, unknown_trips))


def _flops(run: Run) -> tuple[int, bool]:
    attributes = run.instruction.attributes
    if run.instruction.opcode == "convolution":
        return _convolution_flops(run), False
    if run.instruction.opcode == "dot":
        left = dims(run.types[0])
        over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
        inner = [left[int(i)] for i in over[1].split(",") if i] if over else []
        return 2 * math.prod(dims(run.instruction.type) + inner), False
    if '"__cublas$' in attributes:
        over = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', attributes)
        inner = [dims(run.types[0])[int(i)] for i in re.findall(r"\d+", over[1] if over else "")]
        return 2 * math.prod(dims(run.instruction.type) + inner), False
    if run.instruction.opcode == "custom-call":
        kernel = re.search(r'"cost_estimate":\{"flops":"(\d+)"', attributes)
        flops = int(kernel[1]) if kernel else _attention_flops(run)
        return flops, flops > 0
    return 0, False


# Of products with the width of a key and with that of a value, in each of splash attention's
# kernels: scores and values; scores, gradients of weights and queries; and those of keys and values
_ATTENTION_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def _attention_flops(run: Run) -> int:
    kernel = re.match(r"splash_m[hq]a_(fwd|dq|dkv)_", run.instruction.name)
    if kernel is None:
        return 0
    query, key, value = [dims(t) for t in run.types if t.startswith(("bf16", "f32"))][:3]
    by_key, by_value = _ATTENTION_PRODUCTS[kernel[1]]
    seen = math.prod(query[:-1]) * key[-2] // 2
    return 2 * seen * (by_key * query[-1] + by_value * value[-1])


def _cycles(run: Run) -> int:
    estimate = re.search(r'"estimated_cycles":"(\d+)"', run.instruction.attributes)
    return int(estimate[1]) if estimate and int(estimate[1]) < ENDLESS else 0


def _convolution_flops(run: Run) -> int:
    attributes = run.instruction.attributes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    left, right = (dims(t) for t in run.types)
    out = dims(run.instruction.type)
    flops = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for n, label in enumerate(sorted(set(labels[1]) - set("bf"))):
        sizes = left[labels[1].index(label)], out[labels[3].index(label)]
        flops *= _window_products(*sizes, **_window(attributes, n))
    return flops


def _window(attributes: str, n: int) -> dict[str, int]:
    """Returns what the window of a convolution is in spatial dimension `n`."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    written = dict(field.split("=") for field in match[1].split()) if match else {}
    values = {key: text.split("x")[n] for key, text in written.items()}
    numbers = {
        key: int(values.get(key, 1)) for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    }
    return numbers | {"pad": int(values.get("pad", "0_0").split("_")[0])}


def _window_products(
    left: int, out: int, *, size: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Returns how many products one spatial dimension takes; zeros of a dilation are none."""
    places = (o * stride - pad + w * rhs_dilate for o in range(out) for w in range(size))
    return sum(p % lhs_dilate == 0 and 0 <= p // lhs_dilate < left for p in places)


# What moves through memory

_MOVES_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async", "after-all", "iota", "partition-id", "replica-id", "opt-barrier"),
)
_SLICES = ("dynamic-slice", "slice", "gather")


def _memory_bytes(program: Program, run: Run) -> int:
    i = run.instruction
    # What is asynchronous counts where it starts.
    if run.fusion or i.operation in _MOVES_NOTHING or i.opcode.endswith(("-update", "-done")):
        return 0
    return _read_bytes(program, run) + _written_bytes(program, run)


def _read_bytes(program: Program, run: Run) -> int:
    operation = run.instruction.operation
    if operation in _SLICES:
        # As large as the result, which may lie on the chip while the operand does not.
        on_chip = not nbytes(run.types[0], memory_only=True)
        return 0 if on_chip else nbytes(run.instruction.result)
    if operation == "dynamic-update-slice":
        return nbytes(run.types[1], memory_only=True)
    if operation != "fusion":
        return sum(nbytes(t, memory_only=True) for t in run.types)
    (inner,) = called(run.instruction.attributes)
    return sum(
        _used_bytes(program, inner, index, nbytes(t, memory_only=True))
        for index, t in enumerate(run.types)
    )


def _used_bytes(program: Program, computation: str, index: int, whole: int) -> int:
    """Returns how much of parameter `index`, of `whole` bytes, a fused computation reads."""
    instructions = program.computations[computation]
    parameter = next(i for i in instructions if _is_parameter(i, index))
    return min(whole, _needed_bytes(program, computation, parameter.name, whole))


def _needed_bytes(program: Program, computation: str, name: str, whole: int) -> int:
    total = 0
    for user in program.computations[computation]:
        if name not in user.inputs:
            continue
        if user.opcode in _SLICES:
            total += nbytes(user.type)
        elif user.opcode == "dynamic-update-slice" and user.inputs[0] == name:
            continue  # what is not replaced stays where it is
        elif user.opcode == "bitcast":
            total += _needed_bytes(program, computation, user.name, whole)
        elif user.opcode == "fusion":
            (inner,) = called(user.attributes)
            places = [n for n, operand in enumerate(user.inputs) if operand == name]
            total += sum(_used_bytes(program, inner, n, whole) for n in places)
        else:
            return whole
    return total


def _written_bytes(program: Program, run: Run) -> int:
    operation = run.instruction.operation
    if operation == "dynamic-update-slice":
        return nbytes(run.types[1], memory_only=True)
    written = nbytes(run.instruction.result, memory_only=True)
    if operation != "fusion" or not written:
        return written
    (inner,) = called(run.instruction.attributes)
    return min(written, _made_bytes(program, inner))


def _made_bytes(program: Program, computation: str) -> int:
    """Returns the bytes that a fused computation makes anew."""
    by_name = {i.name: i for i in program.computations[computation]}
    root = next(i for i in by_name.values() if i.root)
    parts = [by_name[name] for name in root.inputs] if root.opcode == "tuple" else [root]
    total = 0
    for part in parts:
        while part.opcode == "bitcast":
            part = by_name[part.inputs[0]]
        if part.opcode == "dynamic-update-slice":
            total += nbytes(by_name[part.inputs[1]].type)
        elif part.opcode == "fusion":
            (inner,) = called(part.attributes)
            total += min(nbytes(part.type), _made_bytes(program, inner))
        else:
            total += nbytes(part.type)
    return total


def _is_parameter(instruction: Instruction, index: int) -> bool:
    return instruction.opcode == "parameter" and instruction.operands == str(index)
