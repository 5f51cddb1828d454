"""LSH attention: contract, plan, engines. The mathematics is in reference/lsh.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import lsh as reference
from . import _check, _dispatch, _library, _lsh, _lsh_check, _tiles
from ._prefix import accumulator


class Rounds(NamedTuple):
    """How a call hashes and which chunks it sees. factors: None in a compiled graph that leaves the length open."""

    n_hashes: int
    factors: list[int] | None
    chunk: int
    look_back: int
    look_ahead: int
    same_bucket: bool
    dedupe: bool
    is_causal: bool
    wrap: bool

    @property
    def n_buckets(self) -> int:
        return math.prod(self.factors)

    def counted(self) -> dict:
        """What the reference counts pairs by."""
        names = ("n_buckets", "chunk", "look_back", "look_ahead", "same_bucket", "dedupe", "is_causal", "wrap")
        return {name: getattr(self, name) for name in names}


class Call(NamedTuple):
    """One validated call, and where it would run."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    rounds: Rounds
    rotations: Tensor | None
    buckets: tuple[Tensor, Tensor | None] | None
    scale: float
    dropout_p: float
    seed: int | Tensor
    # of the rotations, where they are drawn
    hash_seed: int
    step: Tensor | None
    norm_eps: float
    explanation: _dispatch.Explanation


# the public door


def prepare(
    op: str,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    *,
    n_hashes: int = 4,
    chunk_size: int = 64,
    n_buckets: int | None = None,
    look_back: int = 1,
    look_ahead: int | None = None,
    within: str = "window",
    dedupe: bool = True,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    rotations: Tensor | None = None,
    buckets: Tensor | tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
    attn_mask: None = None,
    impl: str = "auto",
    factors: list[int] | None = None,
    wrap: bool = False,
    norm_eps: float = 0.0,
    hash_seed: int | None = None,
    step: Tensor | None = None,
) -> Call:
    """The arguments of `lsh_attention`, and what modules need for training and for foreign checkpoints.

    hash_seed, step: of the rotations, where they are not those of seed, which then may be a tensor. factors: of
    n_buckets. wrap: chunks look over the edge of a round into the rounds before and after. norm_eps: of the length of
    shared keys, sqrt(|x|^2 + norm_eps).
    """
    if attn_mask is not None:
        remedy = "pass is_causal, key_padding_mask or cu_seqlens; other masks take longattn.softmax_attention"
        _check.fail(op, f"a dense attn_mask would cost what hashing saves; {remedy}")
    hash_seed = seed if hash_seed is None else hash_seed
    _lsh_check.options(op, n_hashes, chunk_size, n_buckets, look_back, look_ahead, within, scale, dropout_p, hash_seed)
    _lsh_check.inputs(op, q, k, v, key_padding_mask, cu_seqlens, enable_gqa, is_causal)
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), None if k is None else k.to(dtype), v.to(dtype)
    reasons = {name: _refuses(name, q, k, v) for name in _dispatch.IMPLS}
    explanation = _dispatch.Explanation(op, _dispatch.choose(op, impl, reasons), reasons)
    drawn = rotations is None and buckets is None
    if factors is None and not (n_buckets is None and drawn and _in_one_op(explanation.chosen)):
        factors = _lsh.factors_for(n_buckets, v.shape[2], chunk_size)
    look_ahead = int(not is_causal) if look_ahead is None else look_ahead
    rounds = Rounds(
        n_hashes, factors, chunk_size, look_back, look_ahead, within == "bucket", dedupe, bool(is_causal), wrap
    )
    if rotations is not None and buckets is not None:
        _check.fail(op, "rotations and buckets exclude each other: buckets are what rotations give")
    if rotations is not None:
        dim = q.shape[3] + (k is not None)
        _lsh_check.rotations_given(op, rotations, v.shape[1], n_hashes, dim, sum(factors) // 2, q)
    if buckets is not None:
        buckets = _lsh_check.buckets_given(op, buckets, q, k, rounds)
    if scale is None:
        scale = 1.0 if k is None else q.shape[3] ** -0.5
    return Call(
        q, k, v, key_padding_mask, cu_seqlens, rounds, rotations, buckets, float(scale), float(dropout_p), seed,
        hash_seed, step, norm_eps, explanation,
    )  # fmt: skip


def _refuses(impl: str, q: Tensor, k: Tensor | None, v: Tensor) -> str | None:
    reason = _dispatch.refuses(impl, q)
    if reason is not None or impl in ("cpu", "reference"):
        return reason
    if impl == "cuda":
        return "LSH attention runs in Triton; CUDA C++ only sorts for it"
    return _tiles.engine(impl).refuses(q, k, v)


# hashing and sorting


def _rotations(call: Call, extra: int) -> Tensor:
    if call.rotations is not None:
        return call.rotations
    rounds, seed = call.rounds, (call.hash_seed + 2**63) % 2**64 - 2**63
    sizes = (call.v.shape[1], rounds.n_hashes, call.q.shape[3] + extra, sum(rounds.factors) // 2)
    return torch.ops.longattn._lsh_rotations(call.q, *sizes, seed, call.step)


def _hash(call: Call, x: Tensor, extra: Tensor | None, rotations: Tensor) -> Tensor:
    impl = call.explanation.chosen
    if impl == "reference":
        return reference.hash_buckets(x, extra, rotations, call.rounds.factors)
    return torch.ops.longattn._lsh_hash(x, extra, rotations, call.rounds.factors, impl)


@torch.no_grad()
def hash_of(call: Call) -> tuple[Tensor, Tensor | None]:
    """-> of queries [B, Hq, R, L], of keys [B, H, R, S] (None where they are shared)"""
    if call.buckets is not None:
        return call.buckets
    q, k = (None if x is None else x.detach() for x in (call.q, call.k))
    if k is None:
        return _hash(call, q, None, _rotations(call, 0)), None
    rotations = _rotations(call, 1)
    extra = _lsh.last_coordinate(torch.ops.longattn._lsh_lengths(k), call.mask, call.cu_seqlens)
    return _hash(call, q, None, rotations), _hash(call, k, extra, rotations)


class Orders(NamedTuple):
    """Of one call, as the tiles take them; by round and place (orders) or by round and position (the others)."""

    order_q: Tensor
    # None where the keys have the order of the queries
    order_k: Tensor | None
    rank_q: Tensor
    rank_k: Tensor
    bucket_q: Tensor | None
    bucket_k: Tensor | None


def _in_one_op(impl: str) -> bool:
    """In a compiled graph one op hashes and sorts: only there, at run time, is the number of buckets known, which goes
    by the length."""
    return torch.compiler.is_compiling() and impl != "reference"


@torch.no_grad()
def orders(call: Call) -> Orders:
    if call.buckets is None and _in_one_op(call.explanation.chosen):
        q, k, v = (None if x is None else x.detach() for x in call[:3])
        rounds, seed = call.rounds, (call.hash_seed + 2**63) % 2**64 - 2**63
        options = (rounds.n_hashes, rounds.factors, rounds.chunk, rounds.same_bucket, call.explanation.chosen)
        tensors = (q, k, v, call.mask, call.cu_seqlens, call.rotations, call.step)
        return _together(torch.ops.longattn._lsh_orders(*tensors, seed, *options), k is None, rounds.same_bucket)
    buckets_q, buckets_k = hash_of(call)
    rounds, cu_seqlens = call.rounds, call.cu_seqlens
    n, chunk = rounds.n_buckets, rounds.chunk

    def sort(buckets: Tensor, mask: Tensor | None, are_queries: bool) -> tuple[Tensor, Tensor, Tensor]:
        keys, n_keys = _lsh.sort_keys(buckets, mask, n, are_queries=are_queries)
        return keys, *torch.ops.longattn._lsh_sort(keys, n_keys, cu_seqlens, chunk)

    kept = (buckets_q, buckets_q if buckets_k is None else buckets_k) if rounds.same_bucket else (None, None)
    if buckets_k is None:
        _, order, rank = sort(buckets_q, call.mask, False)
        return Orders(order, None, rank, rank, *kept)
    keys_k, order_k, rank_k = sort(buckets_k, call.mask, False)
    mask = call.mask if buckets_q.shape[-1] == buckets_k.shape[-1] else None
    keys_q, order_q, rank_q = sort(buckets_q, mask, True)
    centred = _lsh.align(keys_q, order_q, rank_q, keys_k, order_k, cu_seqlens, n_buckets=n, chunk=chunk)
    return Orders(order_q, order_k, centred, rank_k, *kept)


def _apart(found: Orders) -> list[Tensor]:
    """Each tensor once: an op returns none twice, and never None."""
    kept = [x for x in found[::2] if x is not None]
    return kept if found.order_k is None else kept + [x for x in found[1::2] if x is not None]


def _together(tensors: list[Tensor], shared: bool, same_bucket: bool) -> Orders:
    """The inverse of `_apart`."""
    of_q, of_k = tensors[: 2 + same_bucket], tensors[2 + same_bucket :]
    order_q, rank_q, bucket_q = of_q if same_bucket else (*of_q, None)
    if shared:
        return Orders(order_q, None, rank_q, rank_q, bucket_q, bucket_q)
    order_k, rank_k, bucket_k = of_k if same_bucket else (*of_k, None)
    return Orders(order_q, order_k, rank_q, rank_k, bucket_q, bucket_k)


_library.define(
    "_lsh_orders",
    "(Tensor q, Tensor? k, Tensor v, Tensor? mask, Tensor? cu_seqlens, Tensor? rotations, Tensor? step, int seed, "
    "int n_hashes, int[]? factors, int chunk, bool same_bucket, str impl) -> Tensor[]",
)


@_library.fake("_lsh_orders")
def _(q, k, v, mask, cu_seqlens, rotations, step, seed, n_hashes, factors, chunk, same_bucket, impl):
    return [
        x.new_empty((*x.shape[:2], n_hashes, x.shape[2]), dtype=torch.int32)
        for x in (q, k)
        if x is not None
        for _ in range(2 + same_bucket)
    ]


def _orders(q, k, v, mask, cu_seqlens, rotations, step, seed, n_hashes, factors, chunk, same_bucket, impl):
    factors = factors or _lsh.factors_for(None, v.shape[2], chunk)
    rounds = Rounds(n_hashes, list(factors), chunk, 0, 0, same_bucket, False, False, False)
    explanation = _dispatch.Explanation("_lsh_orders", impl, {})
    masks, options = (mask, cu_seqlens), (None, 1.0, 0.0, seed, seed, step, 0.0, explanation)
    return _apart(orders(Call(q, k, v, *masks, rounds, rotations, *options)))


_library.run(_lsh_orders=_orders)


# running it


def run(call: Call) -> Tensor:
    q, k, v, mask, cu_seqlens, rounds, _, _, scale, dropout_p, seed, _, _, norm_eps, explanation = call
    if dropout_p == 1:
        # every weight is dropped: 0, with gradient 0
        output = run(call._replace(dropout_p=0.0))
        return output.masked_fill(torch.ones((), dtype=torch.bool, device=output.device), 0)
    seed = seed if isinstance(seed, Tensor) else (seed + 2**63) % 2**64 - 2**63
    if explanation.chosen == "reference":
        return _run_reference(call, seed)
    self_rule = _tiles.SELF_FALLBACK if k is None else _tiles.SELF_ALWAYS if rounds.is_causal else _tiles.SELF_ORDINARY
    options = _tiles.Options(
        rounds.chunk, rounds.look_back, rounds.look_ahead, 0, rounds.is_causal, self_rule, rounds.dedupe, rounds.wrap,
        scale, dropout_p, seed, explanation.chosen,
    )  # fmt: skip
    key_scale = None
    if k is None:
        with torch.no_grad():
            key_scale = _lsh.key_scale(torch.ops.longattn._lsh_lengths(q.detach()), norm_eps)
    return _tiles.attend(q, k, v, mask, cu_seqlens, key_scale, orders(call), options)


def _run_reference(call: Call, seed: int) -> Tensor:
    q, k, v, acc = call.q, call.k, call.v, accumulator(call.q.dtype)
    with torch.no_grad():
        count = reference.pair_counts(*hash_of(call), call.mask, call.cu_seqlens, **call.rounds.counted())
    # the inputs have autocast's dtype already; the sums keep theirs
    with _dispatch.without_autocast(q.device.type):
        q, k, v = (None if x is None else x.to(acc) for x in (q, k, v))
        names = {"scale": call.scale, "dropout_p": call.dropout_p, "seed": seed, "norm_eps": call.norm_eps}
        return reference.attend(q, k, v, call.mask, count, **names)[0].to(call.q.dtype)


def lsh_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    *,
    n_hashes: int = 4,
    chunk_size: int = 64,
    n_buckets: int | None = None,
    look_back: int = 1,
    look_ahead: int | None = None,
    within: str = "window",
    dedupe: bool = True,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    rotations: Tensor | None = None,
    buckets: Tensor | tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
    attn_mask: None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention over the keys whose hash is near that of the query, in time and memory O(n log n) and O(n).

        o_i = sum_j softmax_j(scale q_i.k_j) v_j    over the j in S_i

    Each of n_hashes rounds hashes the rows with random rotations, sorts them by bucket, cuts the order into chunks, and
    lets a query see its own chunk and the look_back before and look_ahead after it. S_i joins the rounds; buckets are
    constants for the gradient. Kitaev et al. 2020 (arXiv 2001.04451), eq. 2-6.

    q: `[B, Hq, L, D]`, k: `[B, H, S, D]`, v: `[B, H, S, E]`; float32, bfloat16, float16, or float64 (CPU and
        reference), one dtype for all, any strides. Sums are float32 (float64 for float64).
    k: None is shared QK, as in the paper: the keys are the queries over their length (a zero vector stays zero), and a
        query sees itself only where it sees no other key. With keys of their own, a causal query always sees itself; a
        chunk of queries is centred on the chunk of keys at the same share of the same bucket, also where L != S.
    n_hashes: rounds. More find more of the attention's mass (`longattn.lsh_recall` measures it) and cost as much more.
    chunk_size: keys in a chunk, any length will do. look_back: chunks seen before the own one.
    n_buckets: even; default the next power of two from 2 S / chunk_size on (S the whole packed length with cu_seqlens).
        It is factored into even numbers above 128, or hashing would cost more than attending.
    look_ahead: default 0 if is_causal, else 1.
    within: "window" (any key in the chunks seen), or "bucket" (only those of the query's bucket).
    dedupe: a key met in several rounds counts once (the paper's correction); False counts it once per round.
    is_causal: query i sees keys 0..i; needs L == S. Later tokens are in the order too: a change of their buckets may
        move the edges of chunks, and with them which earlier keys are seen.
    key_padding_mask: bool `[B, S]`, True for a padded key: never seen whatever it holds, NaN too. With k=None a padded
        position is no query either and gets 0.
    scale: default 1 with k=None (unit keys and no more, as trax and Hugging Face train), else 1/sqrt(D).
    dropout_p: of the weights, by a hash of seed, head and the two positions: the same weights on every engine, and in
        forward and backward.
    seed: of rotations and dropout.
    rotations: float32 `[H, n_hashes, D, C]` (D + 1 where k is given, for a coordinate that evens the lengths of the
        keys), C half the sum of the bucket factors; in place of those drawn from seed.
    buckets: int `[B, H, n_hashes, L]`, or with k a pair (`[B, Hq, n_hashes, L]`, `[B, H, n_hashes, S]`), in place of
        hashing. On a GPU a bucket out of range is an assertion of the device.
    cu_seqlens: int32 `[P+1]`, boundaries of P sequences packed along the length, from 0 to L; then B = 1 and L = S.
    enable_gqa: Hq may be a multiple of H; query head h reads key head h // (Hq / H).
    attn_mask: refused; there for a sentence in place of Python's.
    impl: "auto", "reference", "cpu" or "triton"; see `longattn.explain`, which also says what sorts.

    Returns `[B, Hq, L, E]` in the inputs' dtype (autocast's under autocast). A query that sees no key gets 0.
    Time does not depend on the contents: equal tokens, or one bucket for all, cost what random ones do.
    Raises ValueError or TypeError in a sentence. The kernels have no second derivative.
    """
    return run(
        prepare(
            "lsh_attention", q, k, v, n_hashes=n_hashes, chunk_size=chunk_size, n_buckets=n_buckets,
            look_back=look_back, look_ahead=look_ahead, within=within, dedupe=dedupe, is_causal=is_causal,
            key_padding_mask=key_padding_mask, scale=scale, dropout_p=dropout_p, seed=seed, rotations=rotations,
            buckets=buckets, cu_seqlens=cu_seqlens, enable_gqa=enable_gqa, attn_mask=attn_mask, impl=impl,
        )
    )  # fmt: skip


def _plan(q: Tensor, *args, **kwargs) -> _dispatch.Explanation:
    explanation = prepare("lsh_attention", q, *args, **kwargs).explanation
    return explanation._replace(beside=_lsh.sorted_by(explanation.chosen, q.device.type))


_dispatch.plan(lsh_attention, _plan)
