"""Run by test_triton_lsh.py in a process of its own: tile attention, hash and sort in Triton's interpreter, on the CPU.

The engine is held to its contract pair by pair: how often a pair counts comes from orders, ranks and rules in loops
over rounds and chunks, and a dense sum in float64 does the rest. The budget is that of longattn.testing.assertions.
"""

import sys
import zlib
from dataclasses import dataclass
from itertools import pairwise

import torch
from longattn.kernels import lsh, softmax
from torch import Tensor

from longattn.ops._lsh import sort_by_torch
from longattn.reference.lsh import hash_buckets, kept, unit_keys
from longattn.testing.assertions import FORWARD_FACTOR, GRADIENT_FACTOR, HEADS, assert_within_budget, blocks
from longattn.testing.lsh import LSH, check_lsh

NAN, INF = float("nan"), float("inf")
FOR_ALL = 1 << 40
# both halves of its 64 bits are negative as int32
SEED = 0x9234567891111111
ORDERS = ("order_q", "order_k", "rank_q", "rank_k", "bucket_q", "bucket_k")


@dataclass(frozen=True)
class Case:
    """R = 0: dense attention. S: separate keys. lengths: of packed sequences, then B = 1 and L is their sum."""

    L: int = 70
    S: int | None = None
    R: int = 1
    B: int = 1
    H: int = 1
    groups: int = 1
    D: int = 16
    E: int = 8
    chunk: int = 16
    look_back: int = 1
    look_ahead: int = 0
    window: int = 0
    buckets: int = 6
    causal: bool = True
    self_rule: int = 1
    dedupe: bool = False
    within: bool = False
    wrap: bool = False
    mask: float = 0.0
    dropout: float = 0.0
    scale: float = 1.0
    lengths: tuple[int, ...] = ()

    @property
    def shared(self) -> bool:
        return self.S is None


DENSE = {"R": 0, "look_back": FOR_ALL, "self_rule": 0, "scale": 0.3}
CASES = {
    "one token": Case(L=1, D=1, E=1),
    "chunk of 64": Case(L=70, chunk=64),
    "two rounds of sevens": Case(L=50, R=2, chunk=7, dedupe=True),
    "three rounds, all options": Case(
        L=40, R=3, H=2, look_ahead=1, causal=False, dedupe=True, within=True, mask=0.3, dropout=0.2, D=5, E=3
    ),
    "chunk of a hundred": Case(L=104, chunk=100, causal=False, look_back=0),
    "look back two": Case(L=60, R=2, look_back=2, look_ahead=1, within=True),
    "wrap": Case(L=45, R=3, chunk=7, wrap=True),
    "wrap, one round, ahead": Case(L=40, chunk=16, wrap=True, look_ahead=1, causal=False, within=True, self_rule=0),
    "packed": Case(L=50, R=2, lengths=(1, 33, 0, 16), dedupe=True, mask=0.2, look_ahead=1, causal=False),
    "alone": Case(L=12, R=2, B=2, chunk=1, look_back=0, dropout=0.3, mask=0.2),
    "separate": Case(L=70, S=70, R=2, groups=2, self_rule=2, dedupe=True, mask=0.3, scale=0.3),
    "separate, fallback": Case(L=40, S=40, groups=2, chunk=7, within=True, look_back=0, dropout=0.3, scale=0.3),
    "crossed": Case(L=20, S=50, R=2, causal=False, self_rule=0, dedupe=True, look_ahead=1, scale=0.3),
    "crossed the other way": Case(L=90, S=20, R=2, H=2, causal=False, self_rule=0, mask=0.5, within=True, scale=0.3),
    "separate, packed": Case(
        L=50, S=50, R=2, lengths=(20, 0, 3, 27), self_rule=2, groups=2, dropout=0.2, look_ahead=1, dedupe=True
    ),
    "separate, wrap": Case(L=50, S=50, R=2, wrap=True, self_rule=0, scale=0.3),
    "dense": Case(L=100, S=100, **DENSE),
    "dense, whole": Case(L=40, S=75, groups=2, mask=0.3, causal=False, look_ahead=FOR_ALL, dropout=0.2, B=2, **DENSE),
    "dense, more queries": Case(L=90, S=20, **DENSE),
    "dense, packed": Case(L=90, S=90, lengths=(70, 0, 20), **DENSE),
    "dense, shared": Case(L=70, R=0, look_back=FOR_ALL),
    "chunks": Case(L=50, S=50, R=0, chunk=16, look_back=1, self_rule=0, scale=0.3, D=20, E=40),
    "sliding": Case(L=50, S=50, R=0, chunk=16, look_back=2, window=20, self_rule=0, scale=0.3, D=20, E=40),
    "sliding, not causal": Case(
        L=40, S=40, R=0, chunk=16, look_back=1, look_ahead=1, window=7, causal=False, self_rule=0, mask=0.3, scale=0.3
    ),
    "wide": Case(L=40, D=130, E=200, chunk=32),
    "all padded": Case(L=20, mask=1.0),
    "no key": Case(L=5, S=0, R=0, self_rule=0, causal=False),
    "no token": Case(L=0),
}


def starts_of(case: Case, N: int) -> list[int]:
    return [0, *torch.tensor(case.lengths).cumsum(0).tolist()] if case.lengths else [0, N]


def build(case: Case, name: str) -> dict[str, Tensor | None]:
    """Inputs in float64, where padded rows hold 0; orders, ranks and buckets of random keys."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    B, H, Hq, R, S = case.B, case.H, case.H * case.groups, max(case.R, 1), case.L if case.shared else case.S
    x = {"mask": torch.rand(B, S, generator=g) < case.mask if case.mask else None}
    x["cu"] = torch.tensor(starts_of(case, S), dtype=torch.int32) if case.lengths else None
    x |= rows(case, x["mask"], g)
    x |= dict.fromkeys(ORDERS)
    if case.R:
        tables = {}
        for side, heads, N in (("q", Hq, case.L), ("k", H, S)):
            bucket = torch.randint(case.buckets, (B, heads, R, N), generator=g, dtype=torch.int32)
            order, rank = sort_by_torch(bucket, case.buckets, x["cu"], case.chunk)
            tables |= {f"order_{side}": order, f"rank_{side}": rank, f"bucket_{side}": bucket if case.within else None}
        if case.shared:
            tables = {key: tables[key] if key.endswith("q") else None for key in tables}
        else:
            tables["rank_q"] = centres(case, tables["order_q"], g)
        x |= tables
    return x


def rows(case: Case, mask: Tensor | None, g: torch.Generator) -> dict[str, Tensor | None]:
    S, Hq = case.L if case.shared else case.S, case.H * case.groups
    shapes = {"q": (Hq, case.L, case.D), "k": (case.H, S, case.D), "v": (case.H, S, case.E)}
    shapes["grad"] = (Hq, case.L, case.E)
    x = {name: torch.randn(case.B, *shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    if case.shared:
        x["k"] = None
    if mask is not None:
        for name in ("q" if case.shared else "k", "v"):
            x[name] = x[name].masked_fill(mask[:, None, :, None], 0)
    return x


def centres(case: Case, order: Tensor, g: torch.Generator) -> Tensor:
    """Every query chunk is centred on a random key chunk of its sequence."""
    rank = torch.empty_like(order)
    starts = starts_of(case, case.L)
    for start, stop in pairwise(starts):
        n_keys = -(-((stop - start) if case.lengths else case.S) // case.chunk)
        for at in range(start, stop, case.chunk):
            rows = order[..., at : min(at + case.chunk, stop)].long()
            u = torch.randint(max(n_keys, 1), order.shape[:3], generator=g, dtype=torch.int32)
            rank.scatter_(-1, rows, u[..., None].expand(rows.shape).contiguous())
    return rank


def counts(case: Case, x: dict) -> Tensor:
    """How often each pair counts, [B, Hq, L, S], from the words of the contract."""
    S = case.L if case.shared else case.S
    R, Hq = max(case.R, 1), case.H * case.groups
    n = torch.zeros(case.B, Hq, case.L, S, dtype=torch.int64)
    dense = torch.arange(max(case.L, S)).expand(case.B, Hq, 1, -1)
    orders = [dense[..., : case.L], dense[..., :S]]
    if case.R:
        orders = [x["order_q"], x["order_q"] if case.shared else x["order_k"].repeat_interleave(case.groups, 1)]
    bucket_q, bucket_k = x["bucket_q"], x["bucket_q"] if case.shared else x["bucket_k"]
    if case.within and not case.shared:
        bucket_k = bucket_k.repeat_interleave(case.groups, 1)
    starts_q = starts_of(case, case.L)
    starts_k = starts_q if case.lengths else [0, S]
    for b in range(case.B):
        for h in range(Hq):
            for (start, stop), (k_start, k_stop) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
                chunks = -(-(k_stop - k_start) // case.chunk)
                for r in range(R):
                    for t, at in enumerate(range(start, stop, case.chunk)):
                        rows = orders[0][b, h, r, at : min(at + case.chunk, stop)].long()
                        u = t if case.shared or not case.R else x["rank_q"][b, h, r, rows[0]].item()
                        reach = (max(u - case.look_back, -chunks * R), min(u + case.look_ahead, 2 * chunks * R) + 1)
                        for seen in range(*reach):
                            r_k, c = r, seen
                            if case.wrap:
                                r_k, c = divmod((r * chunks + seen) % (R * chunks), chunks)
                            elif not 0 <= seen < chunks:
                                continue
                            at_k = k_start + c * case.chunk
                            columns = orders[1][b, h, r_k, at_k : min(at_k + case.chunk, k_stop)].long()
                            met = torch.ones(len(rows), len(columns), dtype=torch.int64)
                            if case.within:
                                met *= bucket_q[b, h, r, rows][:, None] == bucket_k[b, h, r_k, columns]
                            n[b, h, rows[:, None], columns] += met
    if case.dedupe:
        n = n.clamp(max=1)
    if case.causal:
        n *= torch.ones(case.L, S).tril().long()
    if case.window:
        n *= (torch.arange(case.L)[:, None] - torch.arange(S)).abs() < case.window
    if x["mask"] is not None:
        n = n * ~x["mask"][:, None, None]
        if case.shared:
            n = n * ~x["mask"][:, None, :, None]
    if case.self_rule:
        itself = torch.eye(case.L, S, dtype=torch.int64)
        n = n * (1 - itself)
        own = itself.expand_as(n)
        if x["mask"] is not None:
            own = own * ~x["mask"][:, None, None]
        n = n + (own if case.self_rule == 2 else own * (n.sum(-1, keepdim=True) == 0))
    return n


def cast(x: dict, dtype: torch.dtype) -> dict:
    return x | {name: None if x[name] is None else x[name].to(dtype) for name in ("q", "k", "v", "grad")}


def brute(case: Case, x: dict, n: Tensor) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients in the dtype of the inputs."""
    names = [name for name in ("q", "k", "v") if x[name] is not None]
    q, k, v = (None if x[name] is None else x[name].clone().requires_grad_() for name in ("q", "k", "v"))
    keys, values = (y.repeat_interleave(case.groups, 1) for y in (unit_keys(q) if k is None else k, v))
    s = torch.where(n > 0, case.scale * (q @ keys.mT), -INF)
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -INF)
    w = n.to(s.dtype) * torch.exp(s - top.masked_fill(top == -INF, 0))
    z = w.sum(-1, keepdim=True)
    p = w / torch.where(z == 0, 1, z)
    if case.dropout:
        p = torch.where(kept(*p.shape, case.dropout, SEED, p.device), p / (1 - case.dropout), 0)
    out = p @ values
    grads = torch.autograd.grad((out * x["grad"]).sum(), [y for y in (q, k, v) if y is not None])
    found = {"output": out, "lse": (top + torch.log(z))[..., 0]}
    return {name: y.detach() for name, y in found.items()} | {
        f"d{name}": grad for name, grad in zip(names, grads, strict=True)
    }


def run(case: Case, x: dict) -> dict[str, Tensor]:
    """The launchers, on padded rows of NaN and infinity and strides that no one would choose."""
    q, k, v, grad = (x[name] for name in ("q", "k", "v", "grad"))
    scale = None
    if case.shared:
        norm = q.float().norm(dim=-1)
        scale = torch.where(norm == 0, 0, 1 / norm)
    if x["mask"] is not None:
        padded = x["mask"][:, None, :, None]
        q, k = (q.masked_fill(padded, NAN), None) if case.shared else (q, k.masked_fill(padded, NAN))
        v = v.masked_fill(padded, INF)
    q, k, v, grad = (None if y is None else y.transpose(1, 3).contiguous().transpose(1, 3) for y in (q, k, v, grad))
    cu = None if x["cu"] is None else x["cu"].repeat_interleave(2)[::2]
    tensors = (q, k, v, x["mask"], cu, scale, *(x[name] for name in ORDERS))
    names = ("chunk", "look_back", "look_ahead", "window", "self_rule", "dedupe", "wrap", "scale")
    options = {name: getattr(case, name) for name in names}
    options |= {"is_causal": case.causal, "dropout_p": case.dropout, "seed": SEED}
    out, lse = softmax.forward(*tensors, **options)
    dq, dk, dv, _ = softmax.backward(grad, *tensors, out, lse, **options)
    assert (k is None) == (dk.dim() == 1)
    found = {"output": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {name: y for name, y in found.items() if y.dim() > 1}


def check(name: str, dtype: torch.dtype) -> float:
    """The share of the budget a case uses."""
    case = CASES[name]
    x = cast(build(case, name), dtype)
    n = counts(case, x)
    oracle, actual = brute(case, cast(x, torch.float64), n), run(case, x)
    yardstick: dict[str, Tensor] = {}
    for seed in range(-(-HEADS // n.shape[1]) if n.numel() else 0):
        drawn = cast(x | rows(case, x["mask"], torch.Generator().manual_seed(seed)), dtype)
        exact = brute(case, cast(drawn, torch.float64), n)
        for key, y in brute(case, drawn, n).items():
            error = matrix(y.double() - exact[key]).nan_to_num(0, 0, 0)
            error = blocks(error).amax((0, 1))
            yardstick[key] = torch.maximum(yardstick.get(key, error), error)
    worst = 0.0
    for key, y in actual.items():
        expected = oracle[key]
        assert y.shape == expected.shape, f"{key} of {name!r}: {list(y.shape)}, expected {list(expected.shape)}"
        assert y.dtype == (torch.float32 if key == "lse" else dtype), f"{key} of {name!r}: {y.dtype}"
        if key == "lse":
            nothing = expected == -INF
            assert torch.equal(y == -INF, nothing), f"lse of {name!r}: rows without a key are not those expected"
            y, expected = y.masked_fill(nothing, 0), expected.masked_fill(nothing, 0)
        if not y.numel() or (expected.abs() < 1e-12).all():
            assert (y.abs() < 1e-6).all(), f"{key} of {name!r} must be 0"
            continue
        factor = GRADIENT_FACTOR if key.startswith("d") else FORWARD_FACTOR
        what = f"{key} of {name!r} ({dtype})"
        worst = max(worst, assert_within_budget(what, matrix(y), matrix(expected), yardstick[key], factor=factor))
    return worst


def matrix(x: Tensor) -> Tensor:
    return x[..., None] if x.dim() == 3 else x


def nan_reaches_who_may_see_it() -> None:
    """NaN in one row changes no bit of the results of rows that do not depend on it, and makes NaN of those that do."""
    case = Case(L=26, R=2, chunk=6, causal=False, D=4, E=4)
    x = cast(build(case, "nan"), torch.float32)
    n = counts(case, x)[0, 0]
    assert (n.sum(1) > n.diagonal()).all(), "no row may fall back on itself here"
    before = run(case, x)
    for name, at in (("v", 11), ("grad", 5), ("q", 19)):
        for bad in (NAN, INF) if name != "q" else (NAN,):
            y = x[name].clone()
            y[:, :, at, 1] = bad
            after = run(case, x | {name: y})
            row = torch.arange(case.L) == at
            queries = row if name == "grad" else n[:, at] > 0
            queries = queries | row if name == "q" else queries
            keys = n[queries].sum(0) > 0
            reached = {"output": queries if name != "grad" else row & False, "dq": queries | keys}
            reached["dv"] = row & False if name == "v" else keys
            for key, expected in reached.items():
                same = (before[key] == after[key]).all(-1)[0, 0]
                assert same[~expected].all(), f"{bad} in {name} reached {key} of rows that do not see it"
                strange = ~after[key].isfinite().all(-1)[0, 0]
                assert strange[expected].all(), f"{bad} in {name} vanished from {key}"


def hash_is_the_first_largest() -> None:
    """Small integers, whose sums are exact, so that there are ties; a NaN; rows of other strides; both key widths."""
    g = torch.Generator().manual_seed(0)
    for heads, D, N, factors, extra in ((2, 3, 40, (8,), 0), (1, 20, 33, (6, 10), 1), (1, 5, 7, (2, 4, 70), 1)):
        x = torch.randint(-2, 3, (1, N, 2, D), generator=g).float().transpose(1, 2)
        x[0, 1, 3, 0] = NAN
        rotations = torch.randint(-2, 3, (heads, 2, D + extra, sum(factors) // 2), generator=g).float()
        more = torch.randint(0, 3, (1, 2, N), generator=g).float() if extra else None
        for rows_, last in ((x, more), (x.bfloat16(), None)):
            found = lsh.hash(rows_, last, rotations, factors)
            expected = hash_buckets(rows_.float(), last, rotations, list(factors))
            assert found.dtype == torch.int32
            assert torch.equal(found, expected), f"{(found != expected).sum()} of {found.numel()} buckets differ"
            assert expected.unique().numel() > 2
    x = torch.full((1, 1, 2, 4), NAN)
    assert (lsh.hash(x, None, torch.ones(1, 2, 4, 6), (4, 8)) == 0).all()
    assert lsh.hash(torch.zeros(1, 2, 0, 4), None, torch.ones(1, 2, 4, 6), (12,)).shape == (1, 2, 2, 0)


if __name__ == "__main__":
    assert softmax.EMULATE, "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    dtype = getattr(torch, sys.argv[1])
    public = {case.name: case for case in LSH}
    for name in sys.argv[2:]:
        if name == "law":
            nan_reaches_who_may_see_it()
            print("law: kept", flush=True)
        elif name == "hash":
            hash_is_the_first_largest()
            print("hash: kept", flush=True)
        elif name in public:
            used = check_lsh(public[name], dtype, "triton")
            print(f"{name}: {max(used.values(), default=0):.2f} of the budget", flush=True)
        else:
            print(f"{name}: {check(name, dtype):.2f} of the budget", flush=True)
