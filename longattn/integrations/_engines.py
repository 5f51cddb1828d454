"""The mechanisms as other libraries call them: grouped heads, a scale, packed sequences, queries that come last."""

from __future__ import annotations

import abc
import inspect
import itertools
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..favor import Favor
from ..nn.local import Local
from ..nn.lsh import LSH, _options
from ..nn.mechanisms import Linear
from ..ops import _check
from ..ops.linear import linear_attention, linear_attention_with_state
from ..ops.lsh import prepare, run
from ..ops.softmax import softmax_attention


class Call(NamedTuple):
    """q `[B, Hq, L, D]`, k and v `[B, H, S, .]`. padding: bool `[B, S]`, True = not seen. is_causal: the queries are
    the last L of the S keys. window: as in softmax_attention. starts: int32, boundaries of packed sequences, rows of
    the batch end to end, with L == S. dense: a mask `[B, 1, L, S]` that says it all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    padding: Tensor | None
    is_causal: bool
    window: int | None
    starts: Tensor | None
    dense: Tensor | None
    scale: float
    dropout_p: float

    @property
    def grouped(self) -> bool:
        return self.q.shape[1] != self.k.shape[1]

    def last(self, keys: int) -> Call:
        """With the last so many keys only; all of them where there are no more."""
        first = max(self.k.shape[2] - keys, 0)
        padding = None if self.padding is None else self.padding[:, first:]
        return self._replace(k=self.k[:, :, first:], v=self.v[:, :, first:], padding=padding)


class Engine(abc.ABC):
    """One mechanism with its options. window: keys that a query looks back on, itself included, if it is so limited."""

    takes_window: ClassVar[bool] = False
    takes_dense: ClassVar[bool] = False
    # what the options are those of, and those of them that have no meaning here
    described: ClassVar[type]
    without: ClassVar[tuple[str, ...]] = ()
    window: int | None = None

    @classmethod
    def options(cls) -> list[str]:
        return [name for name in inspect.signature(cls.described).parameters if name not in cls.without]

    @abc.abstractmethod
    def whole(self, call: Call, name: str) -> Tensor:
        """Queries at the places of the keys, or not causal."""

    def cached(self, call: Call, name: str) -> Tensor:
        """Causal, fewer queries than keys: exactly."""
        return exact_cached(call)

    def packed(self, call: Call, name: str) -> Tensor:
        """One row of sequences, each for itself."""
        bounds = call.starts.tolist()
        parts = []
        for first, end in itertools.pairwise(bounds):
            q, k, v = (x[:, :, first:end] for x in call[:3])
            padding = None if call.padding is None else call.padding[:, first:end]
            parts.append(self.whole(call._replace(q=q, k=k, v=v, padding=padding, starts=None), name))
        return torch.cat(parts, 2)


def attend(engine: Engine, call: Call, name: str) -> Tensor:
    """-> `[B, Hq, L, E]`. name: for its sentences."""
    L, S = call.q.shape[2], call.k.shape[2]
    if call.starts is not None:
        B = call.q.shape[0]
        padding = None if call.padding is None else call.padding.reshape(1, -1)
        one = call._replace(q=_end_to_end(call.q), k=_end_to_end(call.k), v=_end_to_end(call.v), padding=padding)
        return engine.packed(one, name).unflatten(2, (B, L))[0].transpose(0, 1)
    if call.is_causal and L != S:
        if L > S:
            _check.fail(name, f"causal attention of {L} queries to {S} keys has no meaning here")
        return engine.cached(call, name)
    return engine.whole(call, name)


def _end_to_end(x: Tensor) -> Tensor:
    """[B, H, L, D] -> [1, H, B L, D]"""
    return x.transpose(0, 1).flatten(1, 2)[None]


# softmax over all keys, or over those of a window


def _softmax(call: Call, impl: str = "auto", dense: Tensor | None = None) -> Tensor:
    return softmax_attention(
        call.q, call.k, call.v, dense, call.dropout_p, call.is_causal, call.scale, call.grouped,
        key_padding_mask=call.padding, window=call.window, impl=impl,
    )  # fmt: skip


def exact_cached(call: Call, impl: str = "auto") -> Tensor:
    """Exact attention of the last queries: one sees all keys, several take a mask of `[L, S]`."""
    L = call.q.shape[2]
    if call.window is not None:
        call = call.last(call.window - 1 + L)
    if L == 1:
        return _softmax(call._replace(is_causal=False, window=None), impl)
    S = call.k.shape[2]
    back = torch.arange(S - L, S, device=call.q.device)[:, None] - torch.arange(S, device=call.q.device)  # [L, S]
    seen = (back >= 0) if call.window is None else (back >= 0) & (back < call.window)
    # such a mask runs in torch alone
    return _softmax(call._replace(is_causal=False, window=None), "auto" if impl == "cpu" else impl, seen)


class ExactEngine(Engine):
    takes_window = takes_dense = True
    # exact attention is that of no window
    described, without = Local, ("window", "chunks")

    def __init__(self, **options) -> None:
        self.impl = Local(**options).impl

    def whole(self, call, name):
        return _softmax(call, self.impl, call.dense)

    def cached(self, call, name):
        return exact_cached(call, self.impl)


class LocalEngine(Engine):
    takes_window = True
    # chunks are counted from the start of a row, which padding moves
    described, without = Local, ("chunks",)

    def __init__(self, **options) -> None:
        self.mechanism = Local(**options)
        self.window = self.mechanism.window

    def whole(self, call, name):
        L, S = call.q.shape[2], call.k.shape[2]
        if L != S:
            remedy = "take attn_implementation='longattn_exact' for attention to other tokens"
            _check.fail(name, f"queries must be among the keys they look near, got {L} queries and {S} keys; {remedy}")
        return _softmax(call._replace(window=self._narrow(call)), self.mechanism.impl)

    def cached(self, call, name):
        window, L = self._narrow(call), call.q.shape[2]
        if L == 1:
            # a mask of its keys knows the window, and where a static cache ends
            call = call.last(window) if call.padding is None else call
            return _softmax(call._replace(is_causal=False, window=None))
        call = call.last(window - 1 + L)
        # rows before the queries, for keys and queries to be at the same places
        q = F.pad(call.q, (0, 0, call.k.shape[2] - L, 0))
        return _softmax(call._replace(q=q, window=window), self.mechanism.impl)[:, :, -L:]

    def _narrow(self, call: Call) -> int:
        return self.window if call.window is None else min(self.window, call.window)


# the keys that hash near the query


class LSHEngine(Engine):
    # a function has no training steps to count, and the layer has a scale
    described, without = LSH, ("scale", "share_qk", "resample", "draws")

    def __init__(self, **options) -> None:
        self.mechanism = LSH(**options, resample="never")

    def whole(self, call, name):
        options = _options(self.mechanism, None, call.v, call.dropout_p)
        options |= {"is_causal": call.is_causal, "key_padding_mask": call.padding, "scale": call.scale}
        return run(prepare(name, call.q, call.k, call.v, enable_gqa=True, cu_seqlens=call.starts, **options))

    packed = whole


# sums over features of the keys


class LinearEngine(Engine):
    described = Linear

    def __init__(self, **options) -> None:
        self.mechanism = Linear(**options)
        feature_map = self.mechanism.feature_map
        if isinstance(feature_map, nn.Module):
            why = f"got {type(feature_map).__name__}, which would not be saved with the model"
            _check.fail("register", f"feature_map must be a name or a function, {why}")

    def _prepared(self, call: Call, name: str) -> tuple[Tensor, Tensor, dict]:
        options = {option: getattr(self.mechanism, option) for option in ("feature_map", "normalize", "scale", "impl")}
        return call.q, call.k, options

    def whole(self, call, name):
        q, k, options = self._prepared(call, name)
        output = linear_attention(
            q, k, call.v, is_causal=call.is_causal, key_padding_mask=call.padding, cu_seqlens=call.starts,
            enable_gqa=call.grouped, **options,
        )  # fmt: skip
        return F.dropout(output, call.dropout_p) if call.dropout_p > 0 else output

    packed = whole

    def cached(self, call, name):
        q, k, options = self._prepared(call, name)
        options |= {"is_causal": True, "enable_gqa": call.grouped}
        state = linear_attention_with_state(q[:, :, :0], k[:, :, :0], call.v[:, :, :0], **options).state
        masks = {"key_padding_mask": call.padding, "state": state}
        output = linear_attention_with_state(q, k, call.v, **masks, **options).output
        return F.dropout(output, call.dropout_p) if call.dropout_p > 0 else output


class FavorEngine(LinearEngine):
    described, without = Favor, ("head_dim", "learn_temperature", "device")

    def __init__(self, **options) -> None:
        self.settings = options
        # by head_dim and device: layers share the projections of their seed
        self.maps: dict[tuple, Favor] = {}
        self._draw(2, None)

    def _draw(self, head_dim: int, device: torch.device | None) -> Favor:
        return Favor(head_dim, **self.settings, device=device)

    def _map(self, head_dim: int, device: torch.device, name: str) -> Favor:
        if (head_dim, device) not in self.maps:
            if torch.compiler.is_compiling():
                _check.fail(name, "projections cannot be drawn while compiling; run the model once before")
            self.maps[head_dim, device] = self._draw(head_dim, device)
        return self.maps[head_dim, device]

    def _prepared(self, call, name):
        q, k = call.q, call.k
        favor = self._map(q.shape[3], q.device, name)
        if favor.normalize is None:
            # the map has a temperature where the layer has a scale; halves of the rest keep the variance low
            given = self.settings.get("temperature")
            rest = call.scale * (q.shape[3] ** 0.5 if given is None else given)
            if not rest > 0:
                _check.fail(name, f"random features need a positive scale, got {call.scale}")
            if rest != 1:
                q, k = q * rest**0.5, k * rest**0.5
        return q, k, {"feature_map": favor}


ENGINES: dict[str, type[Engine]] = {
    "exact": ExactEngine,
    "local": LocalEngine,
    "lsh": LSHEngine,
    "favor": FavorEngine,
    "linear": LinearEngine,
}
