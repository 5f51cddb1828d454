"""Axial and rotary positions: what they are, any length and offset, and what is refused."""

import math

import pytest
import torch

from longattn.nn import AxialPositionalEmbedding, Rotary
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import draw


def axial(shape, dims):
    torch.manual_seed(0)
    return AxialPositionalEmbedding(shape, dims, std=1.0, dtype=torch.float64)


GRIDS = pytest.mark.parametrize(
    ("shape", "dims"), [((4, 6), (3, 5)), ((4, 6), 8), ((3, 2, 5), (1, 2, 4)), ((3, 2, 5), 3), ((24,), (7,))]
)


@GRIDS
def test_a_position_is_the_rows_of_its_coordinates(shape, dims):
    module = axial(shape, dims)
    table = module(module.max_length)
    for n in range(module.max_length):
        coordinates, rest = [], n
        for size in reversed(shape):
            coordinates.insert(0, rest % size)
            rest //= size
        rows = [weight[i] for weight, i in zip(module.weights, coordinates, strict=True)]
        assert torch.equal(table[n], sum(rows[1:], rows[0]) if isinstance(dims, int) else torch.cat(rows))


@GRIDS
def test_any_length_and_offset_is_a_slice_of_the_whole(shape, dims):
    module = axial(shape, dims)
    whole = module(module.max_length)
    for offset in range(module.max_length):
        for length in range(module.max_length - offset + 1):
            assert torch.equal(module(length, offset), whole[offset : offset + length])


@GRIDS
def test_gradients_of_axial_embeddings_are_those_of_lookups(shape, dims):
    module = axial(shape, dims)
    n = module.max_length
    (grad,) = draw((n, 8 if not isinstance(dims, int) else dims), dtype=torch.float64)
    grad = grad[:, : module(1).shape[1]]
    for offset, length in ((0, n), (1, n - 3), (5, 3)):
        found = torch.autograd.grad(module(length, offset), list(module.weights), grad[:length])
        rows = torch.cat([module(1, offset + i) for i in range(length)])
        for x, y in zip(found, torch.autograd.grad(rows, list(module.weights), grad[:length]), strict=True):
            assert_near(x, y, 1e-12)


def test_a_grid_of_half_a_million_positions_has_small_tables():
    module = AxialPositionalEmbedding((512, 1024), (64, 192))
    assert module.max_length == 2**19
    assert sum(p.numel() for p in module.parameters()) == 512 * 64 + 1024 * 192
    assert torch.equal(module(1, 2**19 - 1)[0], torch.cat([w[-1] for w in module.weights]))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: AxialPositionalEmbedding((4, 6), 3)(25), r"25 positions are more than the 4 x 6 = 24 of its shape"),
        (lambda: AxialPositionalEmbedding((4, 6), 3)(1, 24), r"25 positions are more than the 4 x 6 = 24"),
        (lambda: AxialPositionalEmbedding((4, 6), (3,)), r"the same axes, got \[4, 6\] and \[3\]"),
        (lambda: AxialPositionalEmbedding(5, 4), "shape must be a list of whole numbers, got int 5"),
        (lambda: AxialPositionalEmbedding((4, 6), 3.5), "dims must be a list of whole numbers, got float 3.5"),
        (lambda: AxialPositionalEmbedding((4, 6), True), "each number of dims must be a whole number of at least 1"),
        (lambda: AxialPositionalEmbedding((4, 6), "35"), "dims must be a list of whole numbers, got str '35'"),
        (lambda: AxialPositionalEmbedding((4, 0), 3), "each number of shape must be a whole number of at least 1"),
        (lambda: AxialPositionalEmbedding((4, 6), 3)(-1), "length must be a whole number of at least 0, got int -1"),
        (lambda: Rotary(7), "head_dim must be even, for it turns pairs, got 7"),
        (lambda: Rotary(8)(torch.zeros(3, 6)), r"x must be \[..., length, 8\], got float32 \[3, 6\]"),
    ],
)
def test_bad_positions_are_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# rotary


def test_rotary_is_a_product_with_complex_numbers():
    rotary, (x,) = Rotary(8, base=100.0), draw((2, 3, 50, 8), dtype=torch.float64)
    turns = torch.polar(
        torch.ones(50, 4, dtype=torch.float64),
        torch.arange(50.0, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4),
    )
    y = torch.complex(x[..., :4], x[..., 4:]) * turns
    assert_near(rotary(x), torch.cat([y.real, y.imag], -1), 1e-12)
    assert_same_bits("along another axis", rotary(x.transpose(1, 2), dim=1), rotary(x).transpose(1, 2))


def test_products_of_rotary_rows_depend_on_their_distance_alone():
    rotary, (q, k) = Rotary(16), draw((16,), (16,), dtype=torch.float64)
    near = rotary(q[None], 7) @ rotary(k[None], 3).T
    far = rotary(q[None], 10**6 + 4) @ rotary(k[None], 10**6).T
    assert_near(near, far, 1e-8)
    assert not math.isclose(near.item(), (rotary(q[None], 8) @ rotary(k[None], 3).T).item(), rel_tol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_continues_where_a_shorter_input_ended(dtype):
    rotary, (x,) = Rotary(10), draw((2, 40, 10), dtype=dtype)
    parts = [rotary(x[:, :17]), rotary(x[:, 17:18], 17), rotary(x[:, 18:], 18)]
    assert_near(torch.cat(parts, 1).float(), rotary(x).float(), 1e-6 if dtype == torch.float32 else 1e-2)


def test_float32_turns_far_positions_as_float64_does():
    rotary, (x,) = Rotary(64), draw((1000, 64))
    assert_near(rotary(x, 2**20), rotary(x.double(), 2**20).float(), 1e-6)
