"""The least a machine must spend on linear attention: flop and byte counts over rates measured on that machine.

Counts are per token and head, for the chunked algorithm with the normaliser as one more value column; no torch here.

    forward   4 D M (projection, if any) + 2 C (M + E) + 4 M (E + 1)
    backward  8 D M (projection, if any) + 2 C (3 M + 2 E + 1) + 10 M (E + 1)

Bytes are those of the tensors alone, each read or written once: q, k, v, out forward; q, k, v, out, grad_out, dq,
dk, dv backward. A floor is the longer of the two times: arithmetic and memory traffic overlap.
"""

from __future__ import annotations

from typing import NamedTuple

CHUNK = 64
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Shape(NamedTuple):
    """One call: tokens n of every sequence, batch B, heads H, head dim D of q and k, value dim E, features M of phi."""

    n: int
    B: int
    H: int
    D: int
    E: int
    M: int
    dtype: str = "float32"

    @property
    def token_heads(self) -> int:
        return self.n * self.B * self.H

    @property
    def projected(self) -> bool:
        """Features made inside the kernel by a [M, D] projection; otherwise phi works element by element and M = D."""
        return self.M != self.D


class Rates(NamedTuple):
    """What the machine does per second: floating point operations, bytes read plus written."""

    flops: float
    bandwidth: float


def forward_flops(shape: Shape, chunk: int = CHUNK) -> int:
    _, _, _, D, E, M, _ = shape
    return shape.token_heads * (4 * D * M * shape.projected + 2 * chunk * (M + E) + 4 * M * (E + 1))


def backward_flops(shape: Shape, chunk: int = CHUNK) -> int:
    _, _, _, D, E, M, _ = shape
    return shape.token_heads * (8 * D * M * shape.projected + 2 * chunk * (3 * M + 2 * E + 1) + 10 * M * (E + 1))


def forward_bytes(shape: Shape) -> int:
    return shape.token_heads * 2 * (shape.D + shape.E) * ITEM_BYTES[shape.dtype]


def backward_bytes(shape: Shape) -> int:
    return shape.token_heads * 4 * (shape.D + shape.E) * ITEM_BYTES[shape.dtype]


def _time(flops: float, moved: float, rates: Rates) -> float:
    return max(flops / rates.flops, moved / rates.bandwidth)


def floor(shape: Shape, direction: str, rates: Rates, chunk: int = CHUNK) -> float:
    """Seconds no kernel of this algorithm can go under. direction: "forward", "backward" or "forward+backward"."""
    seconds = {
        "forward": _time(forward_flops(shape, chunk), forward_bytes(shape), rates),
        "backward": _time(backward_flops(shape, chunk), backward_bytes(shape), rates),
    }
    if direction == "forward+backward":
        return sum(seconds.values())
    return seconds[direction]


def decode_floor(shape: Shape, rates: Rates) -> float:
    """Seconds of one token's step: the float32 state is read and written once (twice in flops: update, read out)."""
    state = shape.B * shape.H * shape.M * (shape.E + 1)
    return _time(4 * state, 2 * 4 * state, rates)


def output_bytes(shape: Shape, direction: str) -> int:
    """The memory no call can do without: its results. The gradients are dq, dk, dv."""
    out = shape.token_heads * shape.E * ITEM_BYTES[shape.dtype]
    gradients = shape.token_heads * (2 * shape.D + shape.E) * ITEM_BYTES[shape.dtype]
    return {"forward": out, "backward": gradients, "forward+backward": out + gradients}[direction]
