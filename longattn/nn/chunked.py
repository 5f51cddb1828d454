"""A feed-forward layer and a loss that go through the length in pieces: their wide middle never exists whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _check
from ..ops._dispatch import without_autocast
from ..ops._prefix import accumulator
from ..ops.affine import affine
from .affine import Affine
from .replay import (
    Autocast,
    Draws,
    Graph,
    Ran,
    awaited,
    first_run,
    gpus_of,
    gradients,
    once,
    outside_graphs,
    replay,
    trained,
)

# name -> the function, and whether half of the hidden width gates the other
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
    "silu": (F.silu, False),
    "geglu": (F.gelu, True),
    "reglu": (F.relu, True),
    "swiglu": (F.silu, True),
}
# logits of a chunk of the loss
LOGITS = 1 << 22
REDUCTIONS = ("mean", "sum", "none")


def _positive(op: str, name: str, x) -> None:
    if not isinstance(x, int) or isinstance(x, bool) or x < 1:
        _check.fail(op, f"{name} must be a positive whole number, got {_check.describe(x)}")


# feed-forward


class _Gradients:
    """Those of the rows and of parameters, summed over chunks."""

    def __init__(self, rows: Tensor, wanted: list[Tensor], needs_rows: bool) -> None:
        self.rows, self.wanted = rows, wanted
        self.sums: list[Tensor | None] = [None] * len(wanted)
        self.drows = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs_rows else None

    def chunk(self, layer, piece: slice, grad: Tensor) -> Tensor:
        """-> what the layer makes of these rows"""
        needs_rows = self.drows is not None
        x = self.rows[piece].detach().requires_grad_(needs_rows)
        y = layer._whole(x)
        found = gradients(Graph.of(y), [x] * needs_rows + self.wanted, grad)
        with torch.no_grad():
            if needs_rows:
                self.drows[piece] = 0 if found[0] is None else found[0]
            for i, (p, one) in enumerate(zip(self.wanted, found[needs_rows:], strict=True)):
                # a parameter that a layer made from this one does not use gets nothing
                if one is not None and self.sums[i] is None:
                    self.sums[i] = torch.zeros(p.shape, dtype=accumulator(p.dtype), device=p.device)
                if one is not None:
                    self.sums[i].add_(one)
        return y.detach()

    def returned(self, needs: list[bool]) -> tuple[Tensor | None, ...]:
        found = (None if x is None else x.to(p.dtype) for x, p in zip(self.sums, self.wanted, strict=True))
        return None, self.drows, *(next(found) if need else None for need in needs)


class _Chunks(torch.autograd.Function):
    """The layer chunk by chunk; keeps the rows and nothing else.

    In the second run of a reversible layer the gradient of its output is known already. Where the output is that of the
    layer, each chunk then takes its gradients at once, and is not computed a third time.
    """

    @staticmethod
    def forward(ctx, layer, rows, *parameters):
        ctx.ran, ctx.autocast = Ran.now(layer, parameters), Autocast.now(rows.device.type)
        ctx.draws = Draws.now(gpus_of(rows)) if layer.dropout > 0 and layer.training else None
        ctx.ahead, ahead = None, awaited() if layer._foresees and not ctx.autocast.casts else None
        fits = ahead is not None and ahead.numel() == rows.numel() and ahead.dtype == rows.dtype
        grads = ahead.reshape(rows.shape) if fits else None
        # a copy is freed, and its address then anybody's
        if fits and grads.data_ptr() == ahead.data_ptr():
            _, needs_rows, *needs = ctx.needs_input_grad
            taken = _Gradients(rows, [p for p, need in zip(parameters, needs, strict=True) if need], needs_rows)
            with torch.enable_grad():
                out = layer._by_chunks(rows, lambda piece: taken.chunk(layer, piece, grads[piece]))
            ctx.ahead = _address(grads), taken
        else:
            with first_run(ctx.autocast):
                out = layer._by_chunks(rows.detach())
        ctx.save_for_backward(rows)
        return out

    @staticmethod
    def backward(ctx, grad):
        once("ChunkedFeedForward")
        (rows,), layer = ctx.saved_tensors, ctx.ran.module
        ctx.ran.check()
        _, needs_rows, *needs = ctx.needs_input_grad
        if ctx.ahead is not None:
            address, taken = ctx.ahead
            ctx.ahead = None
            if address == _address(grad):
                return taken.returned(needs)
            # something stands between this layer and the output of the branch
            layer._foresees = False
        wanted = [p for p, need in zip(ctx.ran.parameters, needs, strict=True) if need]
        taken = _Gradients(rows, wanted, needs_rows)
        with replay(ctx.autocast, ctx.draws):
            for piece in _pieces(len(rows), layer.chunk_size):
                taken.chunk(layer, piece, grad[piece])
        return taken.returned(needs)


def _address(x: Tensor) -> tuple:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version


def _pieces(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


class ChunkedFeedForward(nn.Module):
    """down(dropout(activation(up(x)))), through the tokens in chunks: the hidden layer exists for one chunk only.

    dim, hidden: of the tokens, and of what `down` reads.
    chunk_size: tokens of a chunk, counted over all leading dimensions; None takes all at once, by plain autograd.
        Nothing but x is kept for the backward pass, which computes each chunk again.
    activation: "gelu", "relu", "silu", or gated, act(a) * b with `up` twice as wide: "geglu", "reglu", "swiglu"
        (Shazeer 2020, arXiv 2002.05202).
    dropout: of the hidden layer, in training; the backward pass draws the same again.

    Chunks change the order of sums and with it the last bits, nothing else. There is no second derivative in chunks.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        chunk_size: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, x in (("dim", dim), ("hidden", hidden), ("chunk_size", 1 if chunk_size is None else chunk_size)):
            _positive("ChunkedFeedForward", name, x)
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            _check.fail("ChunkedFeedForward", f"activation must be one of {known}, got {activation!r}")
        if not (isinstance(dropout, (int, float)) and 0 <= dropout <= 1):
            _check.fail("ChunkedFeedForward", f"dropout must be a probability from 0 to 1, got {dropout!r}")
        self.dim, self.hidden, self.chunk_size = dim, hidden, chunk_size
        # whether its output has been found to be that of a reversible layer's branch
        self._foresees = True
        self.activation, self.dropout = activation, float(dropout)
        made, gated = {"bias": bias, "device": device, "dtype": dtype}, ACTIVATIONS[activation][1]
        self.up = Affine(dim, hidden * (1 + gated), **made)
        self.down = Affine(hidden, dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., dim]` -> `[..., dim]`"""
        if self.chunk_size is None or x.shape[:-1].numel() <= self.chunk_size:
            return self._whole(x)
        rows = x.reshape(-1, x.shape[-1])  # [tokens, dim]
        parameters = trained(self)
        if torch.is_grad_enabled() and (parameters or x.requires_grad):
            out = _Chunks.apply(self, rows, *parameters)
        else:
            out = self._by_chunks(rows)
        return out.view(x.shape)

    def _whole(self, x: Tensor) -> Tensor:
        act, gated = ACTIVATIONS[self.activation]
        h = self.up(x)
        if gated:
            a, b = h.chunk(2, -1)
            h = act(a) * b
        else:
            h = act(h)
        return self.down(torch.dropout(h, self.dropout, self.training))

    def _by_chunks(self, rows: Tensor, run: Callable[[slice], Tensor] | None = None) -> Tensor:
        out = None
        for piece in _pieces(len(rows), self.chunk_size):
            y = self._whole(rows[piece]) if run is None else run(piece)
            if out is None:
                out = torch.empty(rows.shape, dtype=y.dtype, device=y.device)
            out[piece] = y
        return out

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, activation={self.activation!r}, dropout={self.dropout}"


# the loss


class _How(NamedTuple):
    chunk: int
    ignore_index: int
    reduction: str
    smoothing: float
    dtype: torch.dtype
    gradients: bool


def _loss_of(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: _How, gradient: bool):
    """One chunk -> its losses [n], and if wanted the derivative of their sum by the logits [n, V]."""
    acc = accumulator(h.dtype)
    logits = affine(h, weight, bias).to(acc)  # [n, V]
    logits.sub_(logits.amax(1, keepdim=True))
    valid = target != how.ignore_index
    at = torch.where(valid, target, 0)[:, None].long()
    wanted = (1 - how.smoothing) * logits.gather(1, at)[:, 0]
    if how.smoothing:
        wanted += how.smoothing * logits.mean(1)
    p = logits.exp_()
    z = p.sum(1)
    losses = (z.log() - wanted).masked_fill_(~valid, 0)
    if not gradient:
        return losses, None
    p.div_(z[:, None]).scatter_add_(1, at, torch.full_like(at, how.smoothing - 1, dtype=acc))
    if how.smoothing:
        p.sub_(how.smoothing / p.shape[1])
    return losses, p.masked_fill_(~valid[:, None], 0)


class _Sums:
    """The gradients of weight and bias, summed over chunks, and those of the rows."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]):
        acc, self.dhidden = accumulator(hidden.dtype), None
        if needs[0]:
            self.dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        self.dweight = torch.zeros(weight.shape, dtype=acc, device=weight.device) if needs[1] else None
        self.dbias = torch.zeros(bias.shape, dtype=acc, device=bias.device) if needs[2] else None

    def add(self, piece: slice, h: Tensor, weight: Tensor, d: Tensor) -> None:
        if self.dbias is not None:
            self.dbias += d.sum(0)
        d = d.to(weight.dtype)
        if self.dhidden is not None:
            self.dhidden[piece] = d @ weight
        if self.dweight is not None and d.dtype == self.dweight.dtype:
            self.dweight.addmm_(d.T, h)
        elif self.dweight is not None:
            self.dweight += d.T @ h

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        return self.dhidden, self.dweight, self.dbias


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, how):
        needs = ctx.needs_input_grad[:3]
        ctx.how, early = how, how.gradients and how.reduction != "none" and any(needs)
        losses = torch.empty(len(hidden), dtype=accumulator(hidden.dtype), device=hidden.device)
        sums = _Sums(hidden, weight, bias, needs) if early else None
        with without_autocast(hidden.device.type):
            w, b = weight.to(how.dtype), None if bias is None else bias.to(how.dtype)
            for piece in _pieces(len(hidden), how.chunk):
                h = hidden[piece].to(how.dtype)
                losses[piece], d = _loss_of(h, w, b, target[piece], how, early)
                if early:
                    sums.add(piece, h, w, d)
        if how.reduction == "none":
            ctx.save_for_backward(hidden, weight, bias, target)
            return losses
        total, ctx.count = losses.sum(), None
        ctx.save_for_backward(*(sums.all if early else ()))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        if how.reduction == "mean":
            ctx.count = (target != how.ignore_index).sum()
            # without a target 0 / 0, as torch has it
            total = total / ctx.count
        return total

    @staticmethod
    def backward(ctx, grad):
        once("chunked_cross_entropy")
        how = ctx.how
        if how.reduction == "none":
            return _CrossEntropy._by_rows(ctx, grad)
        if ctx.count is not None:
            grad = grad / ctx.count.clamp(min=1)
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        found = (None if x is None else x * grad if keeps else x.mul_(grad) for x in ctx.saved_tensors)
        found = (None if x is None else x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
        return *found, None, None

    @staticmethod
    def _by_rows(ctx, grad):
        """Each row's loss has a gradient of its own, which only the backward pass knows."""
        (hidden, weight, bias, target), how = ctx.saved_tensors, ctx.how
        sums = _Sums(hidden, weight, bias, ctx.needs_input_grad[:3])
        with without_autocast(hidden.device.type):
            w, b = weight.to(how.dtype), None if bias is None else bias.to(how.dtype)
            for piece in _pieces(len(hidden), how.chunk):
                h = hidden[piece].to(how.dtype)
                _, d = _loss_of(h, w, b, target[piece], how, True)
                sums.add(piece, h, w, d.mul_(grad[piece, None]))
        inputs = (hidden, weight, bias)
        return *(None if x is None else x.to(y.dtype) for x, y in zip(sums.all, inputs, strict=True)), None, None


_losses = outside_graphs(_CrossEntropy.apply)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias), target)`, of which only the logits of one chunk ever exist.

    hidden: `[..., D]`; weight: `[V, D]`, bias: `[V]`; float32, bfloat16, float16 or float64, one dtype for all.
    target: int64 or int32 `[...]`, from 0 to V - 1, or ignore_index: no loss, no gradient, not counted.
    chunk_size: tokens of a chunk; default so many that a chunk has about four million logits, at least 128.
    reduction, label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Gradients are computed with the loss, while the chunk's logits are there ("none": they are formed once more), so the
    backward pass only scales them. Softmax and sums in float32 (float64 for float64), products in the inputs' dtype
    or autocast's. Returns float32 (float64), `[]`, or `[...]` for "none". There is no second derivative.
    Raises ValueError or TypeError in a sentence; a target out of range on a GPU is an assertion of the device.
    """
    name = "chunked_cross_entropy"
    _check_loss(name, hidden, weight, bias, target, reduction, label_smoothing)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if chunk_size is None:
        chunk_size = max(LOGITS // max(len(weight), 1), 128)
    _positive(name, "chunk_size", chunk_size)
    if flat.device.type == "cpu" and flat.numel():
        known = flat[flat != ignore_index]
        if known.numel() and not (known.min() >= 0 and known.max() < len(weight)):
            came = f"got {known.min()} to {known.max()}"
            _check.fail(name, f"target must be from 0 to {len(weight) - 1} or ignore_index = {ignore_index}, {came}")
    device, dtype = hidden.device.type, hidden.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    how = _How(chunk_size, ignore_index, reduction, float(label_smoothing), dtype, torch.is_grad_enabled())
    losses = _losses(rows, weight, bias, flat, how)
    return losses.view(target.shape) if reduction == "none" else losses


def _check_loss(name, hidden, weight, bias, target, reduction, smoothing) -> None:
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for what, x in tensors.items():
        if not isinstance(x, Tensor) or x.dtype not in _check.DTYPES or x.dtype != hidden.dtype:
            expected = f"{what} must be a float32, bfloat16, float16 or float64 tensor, one dtype for all"
            _check.fail(name, f"{expected}, got {_check.describe(x)}", TypeError)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        came = f"got {list(hidden.shape)} and {list(weight.shape)}"
        _check.fail(name, f"hidden must be [..., D] and weight [V, D], {came}")
    if len(weight) == 0:
        _check.fail(name, f"weight must be [V, D] with a class at least, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        _check.fail(name, f"bias must be [V] = {[len(weight)]}, got {list(bias.shape)}")
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        _check.fail(name, f"target must hold class numbers, int64 or int32, got {_check.describe(target)}", TypeError)
    if target.shape != hidden.shape[:-1]:
        came = f"got {list(target.shape)}"
        _check.fail(name, f"target must have hidden's shape without the last dim, {list(hidden.shape[:-1])}, {came}")
    if any(x.device != hidden.device for x in (target, *tensors.values())):
        _check.fail(name, f"all tensors must be on {hidden.device}")
    if reduction not in REDUCTIONS:
        _check.fail(name, f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if not (isinstance(smoothing, (int, float)) and 0 <= smoothing <= 1):
        _check.fail(name, f"label_smoothing must be from 0 to 1, got {smoothing!r}")
