"""The small Reformer of several test files."""

import torch

from longattn.models.reformer import Reformer, ReformerConfig

SMALL = {
    "vocab": 50, "dim": 24, "depth": 2, "heads": 3, "hidden": 32, "max_length": 48, "window": 6, "chunk_size": 4,
    "n_buckets": 8, "loss_chunk": 16,
}  # fmt: skip


def config(**options):
    return ReformerConfig(**SMALL | options)


def reformer(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return Reformer(config(**options)).to(dtype)


def text(B=2, L=20, vocab=50, seed=1):
    return torch.randint(vocab, (B, L), generator=torch.Generator().manual_seed(seed))
