"""What a training step of a Reformer holds in memory at its fullest moments, by part, computed from its sizes.

Tensors are counted as the code of `models`, `nn` and `native` holds them, on a CPU with the compiled kernels. In every
step from the second on, when the optimiser has its state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..models import ReformerConfig
from ..native import DTYPES, extension
from ..native.linear import slots_of
from ..ops import _lsh
from ..ops import softmax as _softmax
from ..ops._prefix import segment_of

PARTS = ("parameters", "optimiser", "gradients", "streams", "kept", "attention", "block", "loss")
# of "favor"
FEATURES = 256
# of Adam: two means of each gradient
OPTIMISER = 2
# rotations of so many draws stay for a while
DRAWS_KEPT = _lsh._draw.cache_parameters()["maxsize"]
WIDE, INDEX, LONG = 4, 4, 8


class Moment(NamedTuple):
    """name: of what happens then; parts: bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Layer(NamedTuple):
    """Of one layer with some mechanism. parameters: numbers in attention and feed-forward; the rest is bytes.

    kept: what plain autograd keeps beside the bookkeeping. block: of its attention, from norm to output.
    """

    parameters: tuple[int, int]
    kept: tuple[int, int]
    bookkeeping: int
    block: int


class Budget:
    """moments(): the candidates for the peak of one step with `batch` sequences of `length` tokens.

    dtype: "float32" or "bfloat16", that of autocast. Byte counts hold float32 parameters and streams.
    """

    def __init__(self, config: ReformerConfig, length: int, batch: int, dtype: str, threads: int) -> None:
        config = config.filled()
        self.config, self.length, self.batch, self.threads = config, length, batch, threads
        self.casts, self.bytes = dtype == "bfloat16", 2 if dtype == "bfloat16" else WIDE
        self.tokens = batch * length
        self.stream = self.tokens * config.dim * WIDE
        # in the dtype of the products: the rows of all tokens, of all heads of all tokens
        self.rows = self.tokens * config.dim * self.bytes
        self.heads = self.tokens * config.heads * config.head_dim * self.bytes
        self.per_head = self.tokens * config.heads
        self.cycle = [self._layer(mechanism) for mechanism in config.mechanisms]
        self.scratch = max(self._scratch(mechanism) for mechanism in config.mechanisms[: config.depth])

    # sizes

    @property
    def outer(self) -> int:
        """Parameters outside the layers."""
        c = self.config
        positions = 0 if c.positions != "axial" else sum(c.axial_shape) * c.dim
        return c.vocab * c.dim + positions + 2 * c.dim

    @property
    def parameters(self) -> int:
        return self.outer + self._of_first(self.config.depth, lambda layer: sum(layer.parameters))

    def _of_first(self, n: int, what: Callable[[Layer], int]) -> int:
        """The sum over layers 0 .. n - 1."""
        each = [what(layer) for layer in self.cycle]
        cycles, rest = divmod(n, len(each))
        return cycles * sum(each) + sum(each[:rest])

    def _layer(self, mechanism: str) -> Layer:
        c = self.config
        inner, projected = c.heads * c.head_dim, 2 if mechanism == "lsh" else 3
        attention = (projected + 1) * c.dim * inner + 2 * c.dim
        feed_forward = 2 * c.dim * c.hidden + c.hidden + c.dim + 2 * c.dim
        means = self.tokens * 2 * WIDE
        # the norm, or each projection's cast of it
        normed = projected * self.rows if self.casts else self.stream
        # the stream, the norm, the projected rows, the output by head and by token
        kept = self.stream + means + normed + (projected + 2) * self.heads
        hidden = self.stream + means
        if self._chunked:
            hidden += self.stream
        else:
            hidden += self.rows + 2 * self.tokens * c.hidden * self.bytes
        # in the kernel's backward pass: the gradient of the output has taken the place of the output by token, and
        # reversible layers make the norm again
        block = kept - self.stream + self._cast_gradient + projected * self.heads
        block -= self.stream if c.reversible and not self.casts else 0
        return Layer((attention, feed_forward), (kept, hidden), self._bookkeeping(mechanism), block)

    @property
    def _chunked(self) -> bool:
        chunk = self.config.feed_forward_chunk
        return chunk is not None and chunk < self.tokens

    @property
    def _cast_gradient(self) -> int:
        """Of a branch's output."""
        return self.rows * self.casts

    def _bookkeeping(self, mechanism: str) -> int:
        """What attention keeps of a layer beside its rows."""
        c = self.config
        if mechanism == "lsh":
            # order and rank; the keys' lengths, log-sum-exp
            return self.per_head * (2 * c.n_hashes * INDEX + 2 * WIDE)
        if mechanism in ("linear", "favor"):
            features = c.head_dim if mechanism == "linear" else FEATURES
            states = self.batch * slots_of(self.length, None, segment_of(features, c.head_dim))
            scales = 1 if mechanism == "linear" else 2
            return self.per_head * scales * WIDE + states * c.heads * features * (c.head_dim + 1) * WIDE
        return self.per_head * WIDE

    def _draws(self) -> int:
        """Rotations that are remembered, of this step and the one before."""
        c = self.config
        if "lsh" not in c.mechanisms:
            return 0
        # given as factors they are factors already
        factors = c.n_buckets if isinstance(c.n_buckets, tuple) else _lsh.factorise(c.n_buckets)
        layers = self._count("lsh")
        return min(DRAWS_KEPT, 2 * layers) * c.heads * c.n_hashes * c.head_dim * (sum(factors) // 2) * WIDE

    def _count(self, mechanism: str) -> int:
        cycles, rest = divmod(self.config.depth, len(self.config.mechanisms))
        names = self.config.mechanisms
        return cycles * names.count(mechanism) + names[:rest].count(mechanism)

    def _scratch(self, mechanism: str) -> int:
        """What the kernels compute in, of all threads; the extension says how much."""
        c, dtype = self.config, torch.bfloat16 if self.casts else torch.float32
        if mechanism in ("linear", "favor"):
            features, projections = (c.head_dim, 0) if mechanism == "linear" else (FEATURES, FEATURES)
            return extension().linear_workspace(c.head_dim, c.head_dim, features, projections, False, self.threads)
        rows = _view((self.batch, c.heads, self.length, c.head_dim), dtype)
        problem = {"q": rows, "v": rows, "is_causal": c.causal, "look_ahead": 0, "window": 0, "wrap": False}
        problem |= {"scale": 1.0, "dropout_p": 0.0, "seed": 0, "threads": self.threads}
        if mechanism == "lsh":
            places = _view((self.batch, c.heads, c.n_hashes, self.length), torch.int32)
            problem |= {"order_q": places, "rank_q": places, "rank_k": places, "dedupe": True, "self_rule": 1}
            problem |= {"key_scale": _view((self.batch, c.heads, self.length), torch.float32)}
            problem |= {"chunk": c.chunk_size, "look_back": 1}
        else:
            reach = _softmax.EVERY if mechanism == "exact" else -(-(c.window - 1) // _softmax.CHUNK)
            problem |= {"k": rows, "dedupe": False, "self_rule": 0, "look_back": reach, "chunk": _softmax.CHUNK}
            problem["window"] = 0 if mechanism == "exact" else c.window
        return max(extension().softmax_workspace(problem, backward) for backward in (False, True))

    # moments

    def moments(self) -> list[Moment]:
        """The fullest ones of attention, feed-forward, loss and optimiser; the largest of them is the step's peak."""
        c = self.config
        # gradients add up towards the first layers and kept activations towards the last, so an end has the peak
        ends = len(self.cycle)
        layers = sorted({*range(min(ends, c.depth)), *range(max(c.depth - ends, 0), c.depth)})
        attention = max((self._attention(i) for i in layers), key=lambda moment: moment.total)
        feed_forward = max((self._feed_forward(i) for i in layers), key=lambda moment: moment.total)
        return [attention, feed_forward, self._loss(), self._optimiser()]

    def peak(self) -> Moment:
        return max(self.moments(), key=lambda moment: moment.total)

    def _moment(self, name: str, **parts: int) -> Moment:
        found = dict.fromkeys(PARTS, 0)
        found["parameters"] = self.parameters * WIDE
        found["optimiser"] = OPTIMISER * self.parameters * WIDE
        found["attention"] = self.scratch + self._draws()
        for part, size in parts.items():
            found[part] += size
        return Moment(name, found)

    def _kept(self, n: int) -> dict[str, int]:
        """The first n layers, where plain autograd keeps them."""
        if self.config.reversible:
            return {"kept": 0, "attention": 0}
        activations = self._of_first(n, lambda layer: sum(layer.kept))
        return {"kept": activations, "attention": self._of_first(n, lambda layer: layer.bookkeeping)}

    def _streams(self, of_last: bool = False) -> int:
        """In the backward pass: two streams (of plain autograd the layer's own), two gradients, which are one where
        they come in, and the number of each token."""
        count = (2 if self.config.reversible else 1) + (1 if of_last else 2)
        return count * self.stream + self.tokens * LONG

    def _gradients(self, layer: int, own: int) -> int:
        """Those of the loss and the layers behind, and `own` more numbers."""
        behind = self.parameters - self._of_first(layer + 1, lambda x: sum(x.parameters)) - self.outer
        return (self.config.vocab * self.config.dim + behind + own) * WIDE

    def _attention(self, i: int) -> Moment:
        layer, kept = self.cycle[i % len(self.cycle)], self._kept(i)
        attention = kept["attention"] + layer.bookkeeping + self.per_head * WIDE
        return self._moment(
            "attention",
            gradients=self._gradients(i, layer.parameters[1]),
            streams=self._streams(),
            kept=kept["kept"],
            attention=attention,
            block=layer.block,
        )

    def _feed_forward(self, i: int) -> Moment:
        c, layer, kept = self.config, self.cycle[i % len(self.cycle)], self._kept(i)
        if not c.reversible:
            kept = {"kept": kept["kept"] + layer.kept[0], "attention": kept["attention"] + layer.bookkeeping}
        chunk = min(self.tokens, c.feed_forward_chunk or self.tokens)
        normed = self.stream if self._chunked else self.rows
        # before and behind the activation, and the gradient of one of them
        hidden = 3 * chunk * c.hidden * self.bytes
        own = layer.parameters[1]
        if self._chunked:
            # the gradient of all rows; a chunk's output and gradient; sums of the parameters' gradients
            hidden += self.stream + 2 * chunk * c.dim * self.bytes
            # all outputs, which such layers make while they take the gradients
            hidden += self.stream if c.reversible and not self.casts else 0
            own *= 2
        return self._moment(
            "feed-forward",
            gradients=self._gradients(i, own),
            streams=self._streams(of_last=i == c.depth - 1),
            **kept,
            block=normed + self.tokens * 2 * WIDE + self._cast_gradient + hidden,
        )

    def _loss(self) -> Moment:
        c = self.config
        chunk = min(c.loss_chunk, self.tokens)
        # the merged streams, their norm and its gradient; targets, means and losses
        whole = 3 * self.stream + self.tokens * (2 * LONG + 3 * WIDE)
        logits = WIDE + 2 * self.casts
        streams = 2 * c.reversible * self.stream + self.tokens * LONG
        return self._moment(
            "loss",
            gradients=c.vocab * c.dim * WIDE,
            streams=streams,
            **self._kept(c.depth),
            loss=whole + chunk * (c.vocab * logits + c.dim * (WIDE + self.casts * WIDE)),
        )

    def _optimiser(self) -> Moment:
        c = self.config
        # the divisor of one parameter, and its square root
        largest = max(c.vocab, c.hidden, c.heads * c.head_dim) * c.dim
        return self._moment("optimiser", gradients=self.parameters * WIDE, optimiser=2 * largest * WIDE)


def _view(sizes: tuple[int, ...], dtype: torch.dtype):
    """A tensor as the extension describes it, without memory."""
    strides = torch.empty(sizes, device="meta").stride()
    return 0, DTYPES[dtype], sizes, strides
