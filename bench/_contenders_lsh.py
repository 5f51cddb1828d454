"""Who takes part beside LSH attention: one builder per package, each from the same rows to a call without arguments.

Shared queries and keys: q and v go in as they come from the projections, which are no part of any call. Exact attention
has keys of its own, k. Laying out the inputs as a package wants them is outside the measured call.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from _contenders import Contender, Inputs, missing_of
from _floors import Tiles
from torch import Tensor
from torch.nn import functional as F

import longattn
from longattn.cli import _attentions
from longattn.ops import _lsh, _tiles
from longattn.ops.lsh import hash_of, orders, prepare

EXACT = ("longattn exact", "torch SDPA")
STAGES = ("hash", "sort", "tiles")


class Case(NamedTuple):
    """One measurement. direction: as in `_floors.floor`. n_hashes = 0: attention over all keys.

    content: "random"; "equal": all tokens are the same; "one bucket": they differ and share every bucket.
    """

    n: int
    B: int = 1
    H: int = 8
    D: int = 64
    E: int = 64
    n_hashes: int = 4
    chunk: int = 64
    content: str = "random"
    dtype: str = "float32"
    direction: str = "forward"
    impl: str = "cpu"
    is_causal: bool = True

    @property
    def shape(self) -> Tiles:
        columns = sum(self.factors) // 2
        return Tiles(
            self.n, self.B, self.H, self.D, self.E, self.n_hashes, self.chunk, columns, self.dtype, self.is_causal
        )

    @property
    def factors(self) -> list[int]:
        """Of the number of buckets: ours, and given to Hugging Face's."""
        return _lsh.factorise(_lsh.default_buckets(self.n, self.chunk))

    @property
    def drawn(self) -> tuple:
        """Cases that are alike in this have the same inputs."""
        return *self[:5], self.content, self.dtype

    @property
    def options(self) -> dict:
        names = {"n_hashes": self.n_hashes, "chunk_size": self.chunk, "is_causal": self.is_causal, "impl": self.impl}
        return names | {"n_buckets": _lsh.default_buckets(self.n, self.chunk)}


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Unit normal q, k, v and grad_out `[B, H, n, .]`, q by content."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)

    def draw(width: int) -> Tensor:
        return torch.empty(case.B, case.H, case.n, width, dtype=dtype, device=device).normal_(generator=generator)

    q, k, v, grad_out = draw(case.D), draw(case.D), draw(case.E), draw(case.E)
    if case.content != "random":
        # far from the origin the others of a cloud have the first one's argmax, but for ties
        q = q[:, :, :1].expand_as(q).contiguous() + (0 if case.content == "equal" else 1e-4) * q
    return Inputs(q, k, v, grad_out)


def directed(case: Case, function, leaves: list[Tensor], grad_out: Tensor):
    """The call to measure, as `_contenders.directed`, for any number of inputs."""
    if case.direction == "forward":
        return torch.no_grad()(lambda: function(*leaves))
    leaves = [x.detach().requires_grad_() for x in leaves]
    if case.direction == "backward":
        made = function(*leaves)
        return lambda: torch.autograd.grad(made, leaves, grad_out, retain_graph=True)

    def both():
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    return both


# builders


def ours(case: Case, inputs: Inputs):
    """longattn.lsh_attention, shared QK: hash, sort, tiles, each pair once."""

    def attend(q: Tensor, v: Tensor) -> Tensor:
        return longattn.lsh_attention(q, None, v, **case.options)

    return directed(case, attend, [inputs.q, inputs.v], inputs.grad_out)


def ours_exact(case: Case, inputs: Inputs):
    """longattn.softmax_attention on the same tile engine: every key."""
    attend = functools.partial(longattn.softmax_attention, is_causal=case.is_causal, impl=case.impl)
    return directed(case, attend, list(inputs[:3]), inputs.grad_out)


def sdpa(case: Case, inputs: Inputs):
    """torch's exact attention."""
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=case.is_causal)
    return directed(case, attend, list(inputs[:3]), inputs.grad_out)


def hugging_face(case: Case, inputs: Inputs):
    """The core of transformers' LSHSelfAttention: its projections return the rows they are given.

    Scale 1 on keys over sqrt(|x|^2 + 1e-6 D), a look over the edges of rounds, pairs counted once for each round, the
    same factors of the number of buckets; its own rotations, from a fixed seed.
    """
    layer = hugging_face_layer(case)
    theirs = [x.transpose(1, 2).flatten(2) for x in (inputs.q, inputs.v, inputs.grad_out)]   # [B, n, H D]
    hidden = torch.empty(case.B, case.n, 0)

    def attend(q: Tensor, v: Tensor) -> Tensor:
        layer.query_key.rows, layer.value.rows = q, v
        return layer(hidden).hidden_states

    return directed(case, attend, theirs[:2], theirs[2])


def hugging_face_layer(case: Case):
    options = {"n_hashes": case.n_hashes, "chunk": case.chunk, "factors": case.factors, "is_causal": case.is_causal}
    return _attentions.hugging_face_layer(heads=case.H, head_dim=case.D, **options)


def reformer_pytorch(case: Case, inputs: Inputs):
    """reformer-pytorch's LSHAttention, which is its core without projections, on `[B H, n, D]`.

    Scale 1 / sqrt(D) on unit keys, one bucket for each chunk and no factors (the hash is quadratic in n), one chunk
    back, a look over the edges of rounds, pairs counted once for each round; evaluation, so nothing is cached.
    """
    from reformer_pytorch.reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=case.chunk, n_hashes=case.n_hashes, causal=case.is_causal).eval()
    theirs = [x.flatten(0, 1) for x in (inputs.q, inputs.v, inputs.grad_out)]
    return directed(case, lambda q, v: layer(q, v)[0], theirs[:2], theirs[2])


def stage(name: str, case: Case, inputs: Inputs):
    """One of ours alone, on what the others made before: hash, sort, or tiles (gather, scores, softmax, values)."""
    call = prepare("bench", inputs.q, None, inputs.v, **case.options)
    if name == "hash":
        return torch.no_grad()(lambda: hash_of(call))
    if name == "sort":
        keys, n_keys = _lsh.sort_keys(hash_of(call)[0], None, call.rounds.n_buckets, are_queries=False)
        return lambda: torch.ops.longattn._lsh_sort(keys, n_keys, None, case.chunk)
    rounds, key_scale = call.rounds, _lsh.key_scale(torch.ops.longattn._lsh_lengths(inputs.q), 0.0)
    options = _tiles.Options(
        rounds.chunk, rounds.look_back, rounds.look_ahead, 0, rounds.is_causal, _tiles.SELF_FALLBACK, rounds.dedupe,
        rounds.wrap, call.scale, 0.0, 0, case.impl,
    )  # fmt: skip
    found = orders(call)

    def attend(q: Tensor, v: Tensor) -> Tensor:
        return _tiles.attend(q, None, v, None, None, key_scale, found, options)

    return directed(case, attend, [inputs.q, inputs.v], inputs.grad_out)


CONTENDERS = {
    "longattn": Contender(ours, True, "longattn"),
    "longattn exact": Contender(ours_exact, True, "longattn"),
    "torch SDPA": Contender(sdpa, True),
    "Hugging Face": Contender(hugging_face, False, "transformers.models.reformer.modeling_reformer"),
    "reformer-pytorch": Contender(reformer_pytorch, False, "reformer_pytorch"),
    **{f"longattn {name}": Contender(functools.partial(stage, name), False, "longattn") for name in STAGES},
}
missing = functools.partial(missing_of, CONTENDERS)


def build(name: str, case: Case, inputs: Inputs | None = None):
    return CONTENDERS[name].build(case, make_inputs(case) if inputs is None else inputs)
