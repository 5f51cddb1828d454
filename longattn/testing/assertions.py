"""Error budgets: a kernel against the float64 reference, with the eager formula in the kernel's dtype as the yardstick.

An error is the largest in a block of 64 rows of one head. It may be FACTOR times that of the yardstick in the same block,
plus two roundings of the block's largest result. Nothing is averaged over the tensor; the limits are the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.linear import linear_attention_with_state
from ..reference import linear as reference
from ..state import LinearState
from .cases import LinearCase, LinearInputs, build, segments_of

FORWARD_FACTOR = 1.5
GRADIENT_FACTOR = 2.0
FLOOR = 2.0
ROWS = 64
# float32, one row, where the terms do not cancel
ROW_LIMIT = 5e-6
CANCELLATION = 64


def _blocks(x: Tensor) -> Tensor:
    """[..., rows, dim] -> [..., n_blocks]: the largest magnitude in each block of rows."""
    rows = x.shape[-2]
    x = F.pad(x.abs(), (0, 0, 0, -rows % ROWS))
    return x.unflatten(-2, (-1, ROWS)).amax((-2, -1))


def assert_within_budget(what: str, actual: Tensor, oracle: Tensor, yardstick: Tensor, *, factor: float) -> float:
    """Holds `actual` to the budget; `[..., rows, dim]` each. Returns the worst share of the budget that was used."""
    assert actual.shape == oracle.shape == yardstick.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    )
    if oracle.numel() == 0:
        return 0.0
    assert oracle.isfinite().all(), f"{what}: the oracle is not finite, so it judges nothing"
    assert yardstick.isfinite().all(), f"{what}: the yardstick is not finite, so it measures nothing"
    assert oracle.count_nonzero() > 0, f"{what}: the oracle is 0 everywhere, so it judges nothing"
    actual_dtype, (actual, yardstick) = actual.dtype, (x.detach().cpu().double() for x in (actual, yardstick))
    strange = (~actual.isfinite()).nonzero()
    assert len(strange) == 0, f"{what}: {len(strange)} values are not finite, the first at {strange[0].tolist()}"

    error, eager = _blocks(actual - oracle), _blocks(yardstick - oracle)                       # [..., n_blocks]
    budget = factor * eager + FLOOR * torch.finfo(actual_dtype).eps * _blocks(oracle)
    # a block whose every result is exactly 0 has no budget: the kernel owes exact zeros there
    used = torch.where(error > 0, error / budget, 0)
    worst = used.max().item()
    if worst > 1:
        at = (used == used.max()).nonzero()[0].tolist()
        sentence = (
            f"{what}: error {error[tuple(at)]:.3g} in block {at} ([..., block of {ROWS} rows]) is {worst:.2f} of its "
            f"budget {budget[tuple(at)]:.3g}; {error[tuple(at)] / eager[tuple(at)]:.2f} times the error of eager "
            f"PyTorch, {factor} allowed; {(used > 1).sum()} of {used.numel()} blocks are over"
        )
        raise AssertionError(sentence)
    return worst


def assert_rows_close(what: str, actual: Tensor, oracle: Tensor, magnitude: Tensor, *, limit: float = ROW_LIMIT) -> float:
    """||error|| / ||oracle|| of every row whose terms do not cancel. magnitude: the same sum over absolute values."""
    error = (actual.detach().cpu().double() - oracle).norm(dim=-1)
    size = oracle.norm(dim=-1)
    judged = (size > 0) & (magnitude.norm(dim=-1) <= CANCELLATION * size)
    assert judged.any(), f"{what}: every row cancels, so none is judged"
    relative = torch.where(judged, error / size, 0)
    assert relative.max() <= limit, (
        f"{what}: row {(relative == relative.max()).nonzero()[0].tolist()} has a relative error of "
        f"{relative.max():.3g}, {limit:.3g} allowed"
    )
    return relative.max().item()


def assert_same_bits(what: str, actual: Tensor, expected: Tensor) -> None:
    """Equal in every bit, but for the payload of a NaN and the sign of a zero."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    different = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    assert not different.any(), (
        f"{what}: {different.sum()} of {different.numel()} values differ, the first at "
        f"{different.nonzero()[0].tolist()}: {actual[different][0]} and {expected[different][0]}"
    )


def evaluate(inputs: LinearInputs, call) -> dict[str, Tensor]:
    """Results and gradients of `call(q, k, v, state) -> (output, state)` by name."""
    leaves = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    if inputs.state is not None:
        leaves |= {"dkv": inputs.state.kv, "dk_sum": inputs.state.k_sum}
    # detach keeps the strides: what the caller laid out is what the kernel reads
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    q, k, v, *state = leaves.values()
    output, (kv, k_sum) = call(q, k, v, LinearState(*state) if state else None)
    results = {"output": output, "kv": kv, "k_sum": k_sum}
    weights = (inputs.grad_output, *inputs.grad_state)
    # a result that no input reaches (k_sum when there is no key) has no gradient to give
    pairs = [(x, w.to(x.dtype)) for x, w in zip(results.values(), weights, strict=True) if x.requires_grad]
    outputs, grad_outputs = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs, allow_unused=True, materialize_grads=True)
    return {name: x.detach() for name, x in results.items()} | dict(zip(leaves, grads, strict=True))


def run_linear(inputs: LinearInputs, impl: str) -> dict[str, Tensor]:
    """The public function with one engine."""
    return evaluate(
        inputs,
        lambda q, k, v, state: linear_attention_with_state(q, k, v, state=state, impl=impl, **inputs.options),
    )


def run_eager(inputs: LinearInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference's formula with every tensor in `dtype`, the sums included: what plain PyTorch gives."""
    options = inputs.options
    names = {"feature": options["feature_map"], "is_causal": options["is_causal"], "normalize": options["normalize"]}
    names["scale"] = 1.0 if options["scale"] is None else options["scale"]

    def call(q, k, v, state):
        kv, k_sum = (None, None) if state is None else (x.to(dtype) for x in state)
        mask, cu_seqlens = options["key_padding_mask"], options["cu_seqlens"]
        output, kv, k_sum = reference.linear_attention(q, k, v, mask, cu_seqlens, kv, k_sum, **names)
        return output, LinearState(kv, k_sum)

    return evaluate(inputs, call)


def run_yardstick(case: LinearCase, inputs: LinearInputs, dtype: torch.dtype, oracle: dict[str, Tensor]):
    """`run_eager`; in float64, where the oracle rounds no less, twice the float32 error brought to float64's rounding."""
    if dtype != torch.float64:
        return run_eager(inputs.clean(), dtype)
    single = build(case, torch.float32)
    eager, exact = run_eager(single.clean(), torch.float32), run_linear(single.double(), "reference")
    shrink = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {name: oracle[name] + shrink * (eager[name] - exact[name]) for name in oracle}


def check_linear(case: LinearCase, dtype: torch.dtype, impl: str, device: str = "cpu") -> dict[str, float]:
    """One case of the table on one engine, every result and gradient; returns the share of each budget that was used."""
    inputs = build(case, dtype)
    with segments_of(case.segment):
        actual = run_linear(build(case, dtype, device), impl)
    if case.sees_nothing:
        for name, x in actual.items():
            assert (x == 0).all(), f"{name} of {case.name!r} ({dtype}, {impl}) must be 0: its queries see no key"
        return {}
    oracle = run_linear(inputs.double(), "reference")
    yardstick = run_yardstick(case, inputs, dtype, oracle)
    used = {}
    for name, x in actual.items():
        what = f"{name} of {case.name!r} ({dtype}, {impl})"
        expected = inputs.q.dtype if name in ("output", "dq", "dk", "dv") else torch.promote_types(dtype, torch.float32)
        assert x.dtype == expected, f"{what}: dtype {x.dtype}, expected {expected}"
        # the sums of features are one row
        matrices = (t.unsqueeze(-2) if t.dim() == 3 else t for t in (x, oracle[name], yardstick[name]))
        factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
        used[name] = assert_within_budget(what, *matrices, factor=factor)
    if dtype == torch.float32 and case.feature != "identity" and actual["output"].numel():
        magnitudes = inputs.double()
        magnitudes = magnitudes._replace(v=magnitudes.v.abs())
        if magnitudes.state is not None:
            magnitudes = magnitudes._replace(state=magnitudes.state._replace(kv=magnitudes.state.kv.abs()))
        magnitude = run_linear(magnitudes, "reference")["output"]
        assert_rows_close(f"output of {case.name!r} ({impl})", actual["output"], oracle["output"], magnitude)
    return used
