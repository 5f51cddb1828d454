"""What the tests of nn.MultiheadAttention share: modules of three heads, and inputs for them."""

import torch
from torch import nn

import longattn
from longattn.nn import MultiheadAttention

E, H = 12, 3
EFFICIENT = longattn.Linear()
# the same rotations in training and evaluation
LSH = longattn.LSH(n_hashes=2, chunk_size=4, resample="never")
MECHANISMS = {
    "exact": "exact",
    "linear": EFFICIENT,
    "relu": longattn.Linear("relu", normalize=False),
    "lsh": LSH,
    "local": longattn.Local(4),
    # its own features for each module
    "favor": "favor",
    # exact up to 5 tokens
    "auto": longattn.Auto(longattn.Local(4), break_even=6),
}
ONE, TWO = torch.zeros(2, 5, E), torch.zeros(2, 7, E)


def build(mechanism="exact", *, seed=0, dtype=torch.float64, heads=H, batch_first=True, **options):
    """A module whose every parameter is random, biases too."""
    module = MultiheadAttention(E, heads, batch_first=batch_first, mechanism=mechanism, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(module, *tensors):
    total = sum(x.square().sum() for x in tensors if x is not None)
    return torch.autograd.grad(total, list(module.parameters()), allow_unused=True)


class Scaled(nn.Module):
    """A feature map with a parameter: elu(x scale) + 1."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, dim, dtype=torch.float64))

    def forward(self, x):
        return longattn.features.elu(x * self.scale)


def constructor(*args, **kwargs):
    return lambda make: make(*args, **kwargs)


def call(*args, options=None, **kwargs):
    return lambda make: make(E, H, batch_first=True, **(options or {}))(*args, **kwargs)
