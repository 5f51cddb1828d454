"""Decode caches: what an attention keeps of the tokens it has seen, so that the next one costs no second look at them.

A cache is called with the rows of the next tokens and returns what they attend to. The first call may bring a whole
prompt, which runs as in training; later ones bring a token each (more are taken one after the other). What it returns
for token t is row t of the training function on tokens 0..t.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from ..nn.local import Local
from ..nn.lsh import LSH, PER_CHUNK, LSHSelfAttention, _options
from ..nn.mechanisms import Exact, Linear, Mechanism
from ..ops import _check, _lsh
from ..ops._prefix import accumulator
from ..ops.linear import linear_attention_with_state
from ..ops.lsh import hash_of, prepare, run
from ..ops.softmax import softmax_attention

# tokens that wait beside the sorted ones until they are moved in among them together
LATE = 128


class Rows:
    """Rows `[B, H, n, D]` that grow at the end, in memory that doubles. keep: no more than so many of the last are
    needed, and memory stays at twice that."""

    def __init__(self, keep: int | None = None) -> None:
        self.keep, self.memory, self.end = keep, None, 0

    def append(self, x: Tensor) -> Tensor:
        """Returns all rows there are."""
        x = x if self.keep is None else x[:, :, -self.keep :]
        new = x.shape[2]
        if self.memory is None or self.end + new > self.memory.shape[2]:
            old = x[:, :, :0] if self.memory is None else self.memory[:, :, : self.end]
            old = old if self.keep is None else old[:, :, -self.keep :]
            self.end = old.shape[2]
            self.memory = x.new_zeros(*x.shape[:2], max(2 * (self.end + new), 32), x.shape[3])
            self.memory[:, :, : self.end] = old
        self.memory[:, :, self.end : self.end + new] = x
        self.end += new
        return self.memory[:, :, : self.end]

    def reorder(self, index: Tensor) -> None:
        self.memory = self.memory[index]


class Cache(abc.ABC):
    """Of one attention. length: tokens seen."""

    def __init__(self) -> None:
        self.length = 0

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor | None, v: Tensor) -> Tensor:
        """q, k, v `[B, H, L, D]` of the next L tokens (k None where queries are the keys) -> `[B, H, L, E]`"""
        rows = (q, k, v)
        if self.length == 0:
            output = self._first(*rows)
            self.length = q.shape[2]
            return output
        outputs = []
        for t in range(q.shape[2]):
            self.length += 1
            outputs.append(self._next(*(None if x is None else x[:, :, t : t + 1] for x in rows)))
        return torch.cat(outputs, 2)

    @abc.abstractmethod
    def _first(self, q: Tensor, k: Tensor | None, v: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _next(self, q: Tensor, k: Tensor | None, v: Tensor) -> Tensor: ...

    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes what sequence index[b] was (beam search); the batch may shrink or grow."""
        # before the first token there is nothing that tells sequences apart
        if self.length:
            self._reorder(index)

    @abc.abstractmethod
    def _reorder(self, index: Tensor) -> None: ...


def _attend(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mechanism.attend(q, k, v, is_causal=True, key_padding_mask=None, dropout_p=0.0)


class KeyValueCache(Cache):
    """Of exact and local attention: keys and values, all of them or those that can still be seen.

    visible: of the length, how many of the last tokens the newest one sees; keep: the most that can be.
    """

    def __init__(self, mechanism: Mechanism, visible: Callable[[int], int] | None, keep: int | None) -> None:
        super().__init__()
        self.mechanism, self.visible = mechanism, visible
        self.k, self.v = Rows(keep), Rows(keep)

    def _first(self, q, k, v):
        self.k.append(k), self.v.append(v)
        return _attend(self.mechanism, q, k, v)

    def _next(self, q, k, v):
        k, v = self.k.append(k), self.v.append(v)
        if self.visible is not None:
            k, v = (x[:, :, -self.visible(self.length) :] for x in (k, v))
        return softmax_attention(q, k, v)

    def _reorder(self, index):
        self.k.reorder(index), self.v.reorder(index)


class StateCache(Cache):
    """Of linear attention: its state, of one size whatever the length."""

    def __init__(self, mechanism: Linear) -> None:
        super().__init__()
        names = ("feature_map", "scale", "normalize", "impl")
        self.options, self.state = {name: getattr(mechanism, name) for name in names}, None

    def _first(self, q, k, v):
        output, self.state = linear_attention_with_state(q, k, v, state=self.state, is_causal=True, **self.options)
        return output

    _next = _first

    def _reorder(self, index):
        self.state = self.state.select(index)


class PrefixCache(Cache):
    """Of any other causal mechanism: its queries, keys and values, attended to anew for each token."""

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        self.mechanism, self.rows = mechanism, (Rows(), Rows(), Rows())

    def _first(self, q, k, v):
        return _attend(self.mechanism, *(rows.append(x) for rows, x in zip(self.rows, (q, k, v), strict=True)))

    def _next(self, q, k, v):
        return self._first(q, k, v)[:, :, -1:]

    def _reorder(self, index):
        for rows in self.rows:
            rows.reorder(index)


class Buckets:
    """For each round the list of positions in each bucket, in the order of their coming; all lists of a round one after
    the other are its order, as sorting would give it.

    Lists lie without gaps between them, so the last LATE tokens wait beside them, each with its place in its list, and
    are moved in together: O(n) work for every LATE tokens, and O(n_buckets) for each.

    A slot is a bucket of a round, r n_buckets + b. A place counts through all rounds: r n + place in the round.
    """

    def __init__(self, buckets: Tensor, n_buckets: int) -> None:
        """buckets: int32 `[B, H, R, n]`"""
        B, H, R, self.n = buckets.shape
        self.shape, self.n_buckets = (B, H, R), n_buckets
        self.slots = torch.arange(R * n_buckets, device=buckets.device).view(R, n_buckets)
        self.order = torch.ops.longattn._lsh_sort(buckets, n_buckets, None, self.n)[0].flatten(2)  # [B, H, R n]
        counts = buckets.new_zeros(B, H, R, n_buckets, dtype=torch.int64)
        counts.scatter_add_(-1, buckets.long(), torch.ones_like(buckets, dtype=torch.int64))
        # where each list begins, and the end of the last: of those moved in, and of all
        self.edges = torch.nn.functional.pad(counts.flatten(2).cumsum(-1), (1, 0))             # [B, H, R n_buckets + 1]
        self.moved = self.edges.clone()
        self._wait(buckets[..., :0].long())

    def _wait(self, slots: Tensor) -> None:
        self.late_slot, self.late_index = slots, slots.clone()                                 # [B, H, R, m]

    def append(self, buckets: Tensor) -> Tensor:
        """The next token's, `[B, H, R]`; returns its places `[B, H, R]`."""
        R = self.slots.shape[0]
        slot = (buckets + self.slots[:, 0]).long()[..., None]                                  # [B, H, R, 1]
        begin, end = self.moved.gather(-1, slot.flatten(2)), self.moved.gather(-1, slot.flatten(2) + 1)
        index = (end - begin).view_as(slot) + (self.late_slot == slot).sum(-1, keepdim=True)
        self.late_slot = torch.cat([self.late_slot, slot], -1)
        self.late_index = torch.cat([self.late_index, index], -1)
        # one more in each round before, and in the own one before each later bucket
        after = torch.arange(R, device=slot.device)[:, None] + (self.slots >= slot)            # [B, H, R, n_buckets]
        self.edges[..., 1:] += after.flatten(2)
        self.n += 1
        place = self.edges.gather(-1, slot.flatten(2)) + index.flatten(2)
        if self.late_slot.shape[-1] >= LATE:
            self._move()
        return place

    def _move(self) -> None:
        """Those that wait go to the ends of their lists."""
        place = torch.arange(self.order.shape[-1], device=self.order.device).expand(self.order.shape)
        slot = torch.searchsorted(self.moved, place.contiguous(), right=True) - 1
        R, late = self.slots.shape[0], self.late_slot.shape[-1]
        order = self.order.new_zeros(*self.shape[:2], R * self.n)
        order.scatter_(-1, self.edges.gather(-1, slot) + place - self.moved.gather(-1, slot), self.order)
        position = torch.arange(self.n - late, self.n, dtype=order.dtype, device=order.device)
        place = self.edges.gather(-1, self.late_slot.flatten(2)) + self.late_index.flatten(2)
        order.scatter_(-1, place, position.repeat(R).expand(place.shape))
        self.order, self.moved = order, self.edges.clone()
        self._wait(self.late_slot[..., :0])

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Which positions lie there, and in which buckets; `[B, H, N]`."""
        slot = torch.searchsorted(self.edges, places.contiguous(), right=True) - 1
        index, begin = places - self.edges.gather(-1, slot), self.moved.gather(-1, slot)
        inside = index < self.moved.gather(-1, slot + 1) - begin
        position = self.order.gather(-1, (begin + index).clamp(max=self.order.shape[-1] - 1)).long()
        late = self.late_slot.shape[-1]
        if late:
            # one number for each list and place in it
            sought, keys = slot * self.n + index, (self.late_slot * self.n + self.late_index).flatten(2)
            keys, which = keys.sort(-1)
            found = torch.searchsorted(keys, sought).clamp(max=keys.shape[-1] - 1)
            position = torch.where(inside, position, self.n - late + which.gather(-1, found) % late)
        return position, slot % self.n_buckets

    def reorder(self, index: Tensor) -> None:
        for name in ("order", "edges", "moved", "late_slot", "late_index"):
            setattr(self, name, getattr(self, name)[index])
        self.shape = (len(index), *self.shape[1:])


class LSHCache(Cache):
    """Of LSH attention with shared queries and keys: rows, values, and for each head and round the positions of each
    bucket, appended and never sorted again.

    The row of token t is row t of `longattn.lsh_attention` on tokens 0..t, with the same n_buckets: its place is after
    all tokens of lower buckets and of its own, its window is cut from that place, and one softmax runs over the union
    of the rounds, with itself as the fallback. Two things it is not. A call on more tokens cuts other windows for
    token t, as every LSH attention does whose later tokens are in the order. And deeper layers of a model keep the rows
    of each token as they were when it came, which a new call on all tokens would compute with the windows of now. Where
    the window covers all tokens, neither makes a difference.
    """

    def __init__(self, attention: LSHSelfAttention | LSH) -> None:
        super().__init__()
        if attention.n_buckets is None or attention.n_buckets == PER_CHUNK:
            why = "their default number follows the length, which grows here"
            _check.fail("LSHCache", f"n_buckets must be given, for tokens to stay in their buckets: {why}")
        self.attention, self.x, self.v, self.key_scale = attention, Rows(), Rows(), Rows()
        self.lists: Buckets | None = None

    def _call(self, q: Tensor, v: Tensor, **options):
        attention = self.attention
        options |= {"norm_eps": getattr(attention, "norm_eps", 0.0)}
        return prepare("LSHCache", q, None, v, is_causal=True, **_options(attention, None, v, 0.0), **options)

    def _append(self, q: Tensor, v: Tensor, norm_eps: float) -> tuple[Tensor, ...]:
        scale = _lsh.key_scale(torch.ops.longattn._lsh_lengths(q), norm_eps)[..., None]
        return self.x.append(q), self.v.append(v), self.key_scale.append(scale)

    def _wraps(self, n: int) -> bool:
        return getattr(self.attention, "wrap", False) and n > self.attention.chunk_size

    def _first(self, q, k, v):
        call = self._call(q, v)
        buckets, _ = hash_of(call)
        self.lists = Buckets(buckets.contiguous(), call.rounds.n_buckets)
        self._append(call.q, call.v, call.norm_eps)
        return run(self._call(q, v, buckets=buckets, wrap=self._wraps(q.shape[2])))

    def _next(self, q, k, v):
        call = self._call(q, v, wrap=self._wraps(self.length))
        rounds, acc, t = call.rounds, accumulator(call.q.dtype), self.length - 1
        bucket, _ = hash_of(call)                                                              # [B, H, R, 1]
        x, values, key_scale = self._append(call.q, call.v, call.norm_eps)
        position, seen = self._window(bucket, rounds)                                          # [B, H, N]
        if rounds.dedupe and rounds.n_hashes > 1:
            position = torch.where(seen, position, self.length).sort(-1).values
            seen = position < self.length
            seen[..., 1:] &= position[..., 1:] != position[..., :-1]
        # itself only where there is no other
        seen = seen & (position != t)
        position = torch.where(seen, position, t)
        batch, head = (torch.arange(n, device=x.device) for n in x.shape[:2])

        def rows(x: Tensor) -> Tensor:
            return x[batch[:, None, None], head[:, None], position].to(acc)

        s = call.scale * (rows(x) @ call.q.to(acc).mT)[..., 0] * rows(key_scale)[..., 0]       # [B, H, N]
        alone = ~seen.any(-1, keepdim=True)
        p = torch.softmax(s.masked_fill(~seen & ~alone, -torch.inf), -1)
        return torch.where(alone[..., None], values[:, :, t:], (p[:, :, None] @ rows(values)).to(v.dtype))

    def _window(self, bucket: Tensor, rounds) -> tuple[Tensor, Tensor]:
        """The positions in the window of the new token, and which of them are there; `[B, H, N]`."""
        lists, R, device = self.lists, rounds.n_hashes, bucket.device
        place = lists.append(bucket[..., 0])
        n, round_ = lists.n, torch.arange(R, device=device)
        chunk = min(rounds.chunk, n)
        begin = ((place - round_ * n) // chunk - rounds.look_back) * chunk                     # [B, H, R]
        width = (rounds.look_back + 1 + rounds.look_ahead) * chunk
        places, round_ = begin[..., None] + torch.arange(width, device=device), round_[:, None]
        if rounds.wrap:
            # the last chunk of a round stands before the first of the next
            span = -(-n // chunk) * chunk
            places = (places + round_ * span) % (R * span)
            places, round_ = places % span, places // span
        seen = (places >= 0) & (places < n)
        position, of = lists.at((places.clamp(0, n - 1) + round_ * n).flatten(2))
        if rounds.same_bucket:
            seen &= of.view_as(seen) == bucket
        return position, seen.flatten(2)

    def _reorder(self, index):
        for rows in (self.x, self.v, self.key_scale, self.lists):
            rows.reorder(index)


def cache_of(attention: Mechanism | LSHSelfAttention) -> Cache:
    """An empty cache for a causal mechanism or `longattn.nn.LSHSelfAttention`. LSH with keys of its own, whose hash
    looks at the longest of all keys, and mechanisms from elsewhere get a PrefixCache."""
    if isinstance(attention, LSHSelfAttention) or (isinstance(attention, LSH) and attention.share_qk):
        return LSHCache(attention)
    if isinstance(attention, Exact):
        return KeyValueCache(attention, None, None)
    if isinstance(attention, Local):
        window = attention.window
        if attention.chunks is None:
            return KeyValueCache(attention, lambda n: min(n, window), window)
        before = attention.chunks[0] * window
        return KeyValueCache(attention, lambda n: min(n, before + (n - 1) % window + 1), before + window)
    return StateCache(attention) if isinstance(attention, Linear) else PrefixCache(attention)
