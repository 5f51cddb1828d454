"""The least a machine must spend on linear attention: flop and byte counts over rates measured on that machine.

Counts are per token and head, with the normaliser as one more value column; no torch here. P projections make M
features (none: phi works element by element). Causal, in chunks of C tokens; I is the width of the products inside a
chunk, M, or D where they are exact (exact_diagonal):

    forward   4 D P + 2 C (I + E) + 4 M (E + 1)
    backward  8 D P + 2 C (3 I + 2 E + 1) + 10 M (E + 1)

Not causal there is no product inside a chunk, and the backward pass finds the state of the keys where the forward pass
left it: 4 D P + 4 M (E + 1) and 8 D P + 8 M (E + 1).

A floor counts each thing once. Kernels of two sweeps (queries in order, keys in reverse) make the features and the
scores of a chunk again in the second, which is their choice and not in it: 4 D P + 2 C (E + 1) more.

Tile attention counts pairs (`Tiles`): each is a product of D, forward, and one of E; backward five for the two, so 2.5
times as much. LSH with R rounds in chunks of C gives a token 2 C pairs in each, whatever causality and repetition leave
of them, so 4 C R (D + E) forward, 8 C D R where D = E; beside them the hash, 2 D R for each column of its rotations.
Attention over all keys has (n + 1) / 2 pairs for each token if causal, else n.

Bytes are those of the tensors alone, each read or written once: q, k, v, out forward; q, k, v, out, grad_out, dq,
dk, dv backward. A floor is the longer of the two times: arithmetic and memory traffic overlap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

CHUNK = 64
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Shape(NamedTuple):
    """One call: tokens n of every sequence, batch B, heads H, head dim D of q and k, value dim E, features M of phi.

    P: rows of the [P, D] projection that makes the features inside the kernel; 0: element by element, and M = D.
    """

    n: int
    B: int
    H: int
    D: int
    E: int
    M: int
    dtype: str = "float32"
    P: int = 0
    is_causal: bool = True
    exact_diagonal: bool = False

    @property
    def token_heads(self) -> int:
        return self.n * self.B * self.H

    @property
    def inputs(self) -> int:
        """Elements of a token's inputs, and of their gradients."""
        return 2 * self.D + self.E

    @property
    def inner(self) -> int:
        """The width of what queries and keys of one chunk are compared by."""
        return self.D if self.exact_diagonal else self.M


class Tiles(NamedTuple):
    """One call of tile attention: tokens n of every sequence, R rounds in chunks of C tokens with columns of rotations
    to hash by (shared queries and keys); R = 0: all keys, with keys of their own."""

    n: int
    B: int
    H: int
    D: int
    E: int
    R: int
    C: int
    columns: int
    dtype: str = "float32"
    is_causal: bool = True

    @property
    def token_heads(self) -> int:
        return self.n * self.B * self.H

    @property
    def inputs(self) -> int:
        """Elements of a token's inputs, and of their gradients."""
        return (1 if self.R else 2) * self.D + self.E

    @property
    def pair_flops(self) -> float:
        """Of the forward pass for each token and head, without the hash."""
        pairs = 2 * self.C * self.R if self.R else (self.n + 1) / 2 if self.is_causal else self.n
        return 2 * (self.D + self.E) * pairs


class Stack(NamedTuple):
    """A training step of layers of attention (projections D x 4D, pairs of each token) and feed-forward (D x hidden).

    The backward pass is twice the forward; that activations are computed again is a choice and not in it.
    """

    n: int
    B: int
    D: int
    hidden: int
    layers: int
    pairs: float
    dtype: str = "float32"

    @property
    def token_heads(self) -> int:
        return self.n * self.B

    @property
    def E(self) -> int:
        return self.D

    @property
    def inputs(self) -> int:
        return self.D

    @property
    def weights(self) -> int:
        """Of the matrices, without biases and norms."""
        return self.layers * self.D * (4 * self.D + 2 * self.hidden)

    @property
    def parameter_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * (self.weights + self.layers * (9 * self.D + self.hidden))

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return 2.0 * self.token_heads * (self.weights + self.layers * 2 * self.pairs * self.D)


class Toeplitz(NamedTuple):
    """One call of linear attention with relative positions: M features, a bias that reaches `reach` offsets each way.

    A pair costs 2 (M + E) flop forward and 2 (3 M + 2 E + 1) backward; "prefix" has those within reach, and 4 M (E + 1)
    and 10 M (E + 1) for each side beyond it. "fft" has 2 M (E + 1) real transforms of length N = 2 n forward, each of
    2.5 N log2 N, and twice as many backward.
    """

    n: int
    B: int
    H: int
    M: int
    E: int
    reach: int
    method: str
    dtype: str = "float32"
    is_causal: bool = True

    @property
    def token_heads(self) -> int:
        return self.n * self.B * self.H

    @property
    def inputs(self) -> int:
        return 2 * self.M + self.E

    @property
    def flops(self) -> dict[str, float]:
        """For each token and head."""
        M, E, sides = self.M, self.E, 1 if self.is_causal else 2
        if self.method == "fft":
            forward = 2 * M * (E + 1) * 5 * math.log2(2 * self.n)
            return {"forward": forward, "backward": 2 * forward}
        pairs, far = (self.n + 1) / 2 if self.is_causal else self.n, 0
        if self.method == "prefix" and self.reach < self.n - 1:
            pairs, far = min(pairs, sides * self.reach + 1), sides * M * (E + 1)
        return {"forward": 2 * (M + E) * pairs + 4 * far, "backward": 2 * (3 * M + 2 * E + 1) * pairs + 10 * far}


class Rates(NamedTuple):
    """What the machine does per second: floating point operations, bytes read plus written."""

    flops: float
    bandwidth: float


def forward_flops(shape: Shape, chunk: int = CHUNK) -> int:
    D, E, M = shape.D, shape.E, shape.M
    inside = 2 * chunk * (shape.inner + E) if shape.is_causal else 0
    return shape.token_heads * (4 * D * shape.P + inside + 4 * M * (E + 1))


def backward_flops(shape: Shape, chunk: int = CHUNK) -> int:
    D, E, M = shape.D, shape.E, shape.M
    inside = 2 * chunk * (3 * shape.inner + 2 * E + 1) if shape.is_causal else 0
    states = (10 if shape.is_causal else 8) * M * (E + 1)
    return shape.token_heads * (8 * D * shape.P + inside + states)


def forward_bytes(shape: Shape) -> int:
    return shape.token_heads * 2 * (shape.D + shape.E) * ITEM_BYTES[shape.dtype]


def backward_bytes(shape: Shape) -> int:
    return shape.token_heads * 4 * (shape.D + shape.E) * ITEM_BYTES[shape.dtype]


def _time(flops: float, moved: float, rates: Rates) -> float:
    return max(flops / rates.flops, moved / rates.bandwidth)


def _tiles(shape: Tiles, rates: Rates) -> dict[str, float]:
    moved = shape.token_heads * (shape.inputs + shape.E) * ITEM_BYTES[shape.dtype]
    flops = shape.token_heads * shape.pair_flops
    hashing = shape.token_heads * 2 * shape.D * shape.R * shape.columns
    return {"forward": _time(flops + hashing, moved, rates), "backward": _time(2.5 * flops, 2 * moved, rates)}


def floor(shape: Shape | Tiles | Stack | Toeplitz, direction: str, rates: Rates, chunk: int = CHUNK) -> float:
    """Seconds no kernel of this algorithm can go under. direction: "forward", "backward" or "forward+backward"."""
    if isinstance(shape, Toeplitz):
        moved = shape.token_heads * (shape.inputs + shape.E) * ITEM_BYTES[shape.dtype]
        flops = {name: shape.token_heads * count for name, count in shape.flops.items()}
        seconds = {name: _time(flops[name], moved * (1 + (name == "backward")), rates) for name in flops}
    elif isinstance(shape, Stack):
        forward = shape.flops / rates.flops
        seconds = {"forward": forward, "backward": 2 * forward}
    elif isinstance(shape, Tiles):
        seconds = _tiles(shape, rates)
    else:
        seconds = {
            "forward": _time(forward_flops(shape, chunk), forward_bytes(shape), rates),
            "backward": _time(backward_flops(shape, chunk), backward_bytes(shape), rates),
        }
    if direction == "forward+backward":
        return sum(seconds.values())
    return seconds[direction]


def decode_floor(shape: Shape | Toeplitz, rates: Rates) -> float:
    """Seconds of one token's step: the float32 state, and a ring, read and written once, in flops updated and read."""
    heads = shape.B * shape.H
    if isinstance(shape, Toeplitz):
        state, ring = heads * shape.M * (shape.E + 1), heads * shape.reach * (shape.M + shape.E)
        return _time(4 * state + 2 * ring, 2 * 4 * (state + ring), rates)
    state = heads * shape.M * (shape.E + 1)
    return _time(4 * state + heads * 4 * shape.D * shape.P, 2 * 4 * state, rates)


def output_bytes(shape: Shape | Tiles | Stack | Toeplitz, direction: str) -> int:
    """The memory no call can do without: its results. The gradients are dq, dk (unless shared), dv."""
    out = shape.token_heads * shape.E * ITEM_BYTES[shape.dtype]
    gradients = shape.token_heads * shape.inputs * ITEM_BYTES[shape.dtype]
    return {"forward": out, "backward": gradients, "forward+backward": out + gradients}[direction]


# LSH on a GPU, whose caches do not hold a sequence from one round to the next


def gathered_bytes(shape: Tiles, direction: str) -> int:
    """Moved where each round gathers its rows: x, v and out, backward x, v, grad_out, dx and dv, with a place and a
    chunk of 4 bytes each; the hash reads x once more.
    """
    item, D, E = ITEM_BYTES[shape.dtype], shape.D, shape.E
    once = {"forward": item * D, "backward": 0}
    each = {"forward": item * (D + 2 * E) + 8, "backward": item * (2 * D + 3 * E) + 8}
    if direction == "forward+backward":
        return sum(gathered_bytes(shape, one) for one in each)
    return shape.token_heads * (once[direction] + shape.R * each[direction])


def part_floor(shape: Tiles, part: str, rates: Rates) -> float:
    """Seconds of the hash alone (x read, a bucket written for each round) or the sort (bucket to place and chunk)."""
    if part == "sort":
        return _time(0, shape.token_heads * shape.R * 12, rates)
    moved = shape.D * ITEM_BYTES[shape.dtype] + 4 * shape.R
    return _time(shape.token_heads * 2 * shape.D * shape.R * shape.columns, shape.token_heads * moved, rates)
