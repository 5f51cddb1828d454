"""Error budgets: a kernel against the float64 reference, with the eager formula in the kernel's dtype as the yardstick.

An error is the largest in a block of 64 rows of one head. It may be 1.5 times (gradients: twice) the yardstick's in the
same block, plus two roundings of the block's largest result. Nothing is averaged; the limits are the same everywhere.
One largest error is a matter of luck, so the yardstick's is that of a dozen heads and draws of the inputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..favor import Favor
from ..ops.linear import linear_attention, linear_attention_with_state
from ..reference import linear as reference
from ..reference.favor import favor_attention
from ..state import LinearState
from .cases import LinearCase, LinearInputs, build, segments_of

FORWARD_FACTOR = 1.5
GRADIENT_FACTOR = 2.0
FLOOR = 2.0
ROWS = 64
# float32, one row, where the terms do not cancel
ROW_LIMIT = 5e-6
CANCELLATION = 64
# heads that make the yardstick, from as many draws of the inputs as it takes; long cases have many blocks and two draws
HEADS = 12
LONG = 200_000


def blocks(x: Tensor) -> Tensor:
    """`[..., rows, dim] -> [..., n_blocks]`: the largest magnitude in each 64 rows; the last block is the last 64."""
    x, rows = x.abs().amax(-1), x.shape[-2]
    starts = [*range(0, rows - ROWS, ROWS), max(rows - ROWS, 0)]
    return torch.stack([x[..., start : start + ROWS].amax(-1) for start in starts], -1)


def assert_within_budget(what: str, actual: Tensor, oracle: Tensor, eager: Tensor, *, factor: float) -> float:
    """Holds `actual` to the budget and returns the worst share of it in use.

    actual, oracle: `[..., rows, dim]`; eager: `[n_blocks]`, the error of eager PyTorch in a block of any head.
    """
    assert actual.shape == oracle.shape, f"{what}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    if oracle.numel() == 0:
        return 0.0
    assert oracle.isfinite().all(), f"{what}: the oracle is not finite, so it judges nothing"
    assert eager.isfinite().all(), f"{what}: the yardstick is not finite, so it measures nothing"
    assert oracle.count_nonzero() > 0, f"{what}: the oracle is 0 everywhere, so it judges nothing"
    epsilon, actual = torch.finfo(actual.dtype).eps, actual.detach().cpu().double()
    strange = (~actual.isfinite()).nonzero()
    assert len(strange) == 0, f"{what}: {len(strange)} values are not finite, the first at {strange[0].tolist()}"

    error = blocks(actual - oracle)                                                            # [..., n_blocks]
    budget = factor * eager + FLOOR * epsilon * blocks(oracle)
    # a block whose every result is exactly 0 has no budget: the kernel owes exact zeros there
    used = torch.where(error > 0, error / budget, 0)
    worst = used.max().item()
    if worst > 1:
        at = (used == used.max()).nonzero()[0].tolist()
        sentence = (
            f"{what}: error {error[tuple(at)]:.3g} in block {at} ([..., block of {ROWS} rows]) is {worst:.2f} of its "
            f"budget {budget[tuple(at)]:.3g}; {error[tuple(at)] / eager[at[-1]]:.2f} times the error of eager "
            f"PyTorch, {factor} allowed; {(used > 1).sum()} of {used.numel()} blocks are over"
        )
        raise AssertionError(sentence)
    return worst


def assert_rows_close(what: str, actual: Tensor, oracle: Tensor, magnitude: Tensor) -> None:
    """||error|| / ||oracle|| of every row whose terms do not cancel. magnitude: the same sum over absolute values."""
    error = (actual.detach().cpu().double() - oracle).norm(dim=-1)
    size = oracle.norm(dim=-1)
    judged = (size > 0) & (magnitude.norm(dim=-1) <= CANCELLATION * size)
    assert judged.any(), f"{what}: every row cancels, so none is judged"
    relative = torch.where(judged, error / size, 0)
    assert relative.max() <= ROW_LIMIT, (
        f"{what}: row {(relative == relative.max()).nonzero()[0].tolist()} has a relative error of "
        f"{relative.max():.3g}, {ROW_LIMIT:.3g} allowed"
    )


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal but for rounding: largest error against largest value."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    assert expected.count_nonzero() > 0, "all that is expected is 0, so it judges nothing"
    error, limit = (actual - expected).abs().max(), tolerance * (1 + expected.abs().max())
    assert error <= limit, f"error {error:.3g}, {limit:.3g} allowed"


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
    q, k, v, *sums = leaves.values()
    state = inputs.state if inputs.state is None else inputs.state._replace(kv=sums[0], k_sum=sums[1])
    favor = inputs.options["feature_map"]
    if isinstance(favor, Favor):
        leaves = leaves | {"dlog_temperature": favor.log_temperature}
    output, state = call(q, k, v, state)
    # where a call has no outgoing state
    results = {"output": output} | ({} if state is None else {"kv": state.kv, "k_sum": state.k_sum})
    weights = (inputs.grad_output, *inputs.grad_state)[: len(results)]
    # a result that no input reaches (k_sum when there is no key) has no gradient to give
    pairs = [(x, w.to(x.dtype)) for x, w in zip(results.values(), weights, strict=True) if x.requires_grad]
    outputs, grad_outputs = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs, allow_unused=True, materialize_grads=True)
    return {name: x.detach() for name, x in results.items()} | dict(zip(leaves, grads, strict=True))


def run_linear(inputs: LinearInputs, impl: str) -> dict[str, Tensor]:
    """The public function with one engine; without its state where exact_diagonal would split the call."""
    if getattr(inputs.options["feature_map"], "exact_diagonal", False):
        assert inputs.state is None
        return evaluate(inputs, lambda q, k, v, _: (linear_attention(q, k, v, impl=impl, **inputs.options), None))
    return evaluate(
        inputs,
        lambda q, k, v, state: linear_attention_with_state(q, k, v, state=state, impl=impl, **inputs.options),
    )


def run_eager(inputs: LinearInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference's formula with every tensor in `dtype`, the sums included: what plain PyTorch gives."""
    options = inputs.options
    if isinstance(options["feature_map"], Favor):
        return _run_eager_favor(inputs, dtype)
    names = {"feature": options["feature_map"], "is_causal": options["is_causal"], "normalize": options["normalize"]}
    names["scale"] = 1.0 if options["scale"] is None else options["scale"]

    def call(q, k, v, state):
        kv, k_sum = (None, None) if state is None else (x.to(dtype) for x in state)
        mask, cu_seqlens = options["key_padding_mask"], options["cu_seqlens"]
        output, kv, k_sum = reference.linear_attention(q, k, v, mask, cu_seqlens, kv, k_sum, **names)
        return output, LinearState(kv, k_sum)

    return evaluate(inputs, call)


def _run_eager_favor(inputs: LinearInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    options, favor = inputs.options, inputs.options["feature_map"]
    names = {"kind": favor.kind, "l2": favor.normalize == "l2", "exact_diagonal": favor.exact_diagonal}
    names["is_causal"] = options["is_causal"]
    mean = favor.key_mean.to(dtype) if favor.center_keys else None

    def call(q, k, v, state):
        sums = (None, None, None) if state is None else (x.to(dtype) for x in state[:3])
        tensors = (options["key_padding_mask"], options["cu_seqlens"], *sums, favor.projection.to(dtype))
        output, kv, k_sum, _ = favor_attention(q, k, v, *tensors, favor.root.to(dtype), mean, **names)
        return output, None if favor.exact_diagonal else LinearState(kv, k_sum)

    return evaluate(inputs, call)


def _matrix(x: Tensor) -> Tensor:
    """The sums of features `[B, H, M]` are one row, and so is a scalar."""
    return x.unsqueeze(-2) if x.dim() == 3 else x.reshape(1, 1, 1, 1) if x.dim() == 0 else x


def eager_errors(case: LinearCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of each result, the error of eager PyTorch in each block, `[n_blocks]`, the worst of many heads.

    In float64, where the oracle rounds no less and in shorter vectors, it is four times float32's in float64's units.
    """
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    shrink = 1 if eager_dtype == dtype else 4 * torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
    errors = {}
    keys = case.L if case.S is None else case.S
    draws = 2 if case.L * keys >= LONG else -(-HEADS // max(case.B * case.H, 1))
    for seed in range(draws):
        inputs = build(case, eager_dtype, seed=seed)
        eager, exact = run_eager(inputs.clean(), eager_dtype), run_linear(inputs.double(), "reference")
        for name, x in exact.items():
            error = shrink * blocks(_matrix(eager[name].double() - x)).amax((0, 1)) if x.numel() else x
            errors[name] = torch.maximum(errors.get(name, error), error)
    return errors


@functools.cache
def _judged(case: LinearCase, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> the oracle's results and `eager_errors`, once for all engines"""
    return run_linear(build(case, dtype).double(), "reference"), eager_errors(case, dtype)


def check_linear(case: LinearCase, dtype: torch.dtype, impl: str, device: str = "cpu") -> dict[str, float]:
    """One case of the table on one engine, every result and gradient; returns the share of each budget in use."""
    inputs = build(case, dtype)
    with segments_of(case.segment):
        actual = run_linear(build(case, dtype, device), impl)
    if case.sees_nothing:
        for name, x in actual.items():
            assert (x == 0).all(), f"{name} of {case.name!r} ({dtype}, {impl}) must be 0: its queries see no key"
        return {}
    (oracle, eager), used = _judged(case, dtype), {}
    for name, x in actual.items():
        what = f"{name} of {case.name!r} ({dtype}, {impl})"
        expected = inputs.q.dtype if name in ("output", "dq", "dk", "dv") else torch.promote_types(dtype, torch.float32)
        assert x.dtype == expected, f"{what}: dtype {x.dtype}, expected {expected}"
        if name == "dlog_temperature" and oracle[name] == 0:
            # no query or no key: nothing to judge by but that
            assert x == 0, what
            continue
        factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
        used[name] = assert_within_budget(what, _matrix(x), _matrix(oracle[name]), eager[name], factor=factor)
    if dtype == torch.float32 and case.favor is None and case.feature != "identity" and actual["output"].numel():
        magnitudes = inputs.double()
        magnitudes = magnitudes._replace(v=magnitudes.v.abs())
        if magnitudes.state is not None:
            magnitudes = magnitudes._replace(state=magnitudes.state._replace(kv=magnitudes.state.kv.abs()))
        magnitude = run_linear(magnitudes, "reference")["output"]
        assert_rows_close(f"output of {case.name!r} ({impl})", actual["output"], oracle["output"], magnitude)
    return used
