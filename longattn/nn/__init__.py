"""Modules: the drop-in for torch.nn.MultiheadAttention and the descriptions of what runs inside it."""

from .attention import MultiheadAttention
from .chunked import ChunkedFeedForward, chunked_cross_entropy
from .lsh import LSH, LSHSelfAttention
from .mechanisms import Exact, Linear, Mechanism
from .replay import recomputing
from .reversible import ReversibleBlock, ReversibleSequence

__all__ = [
    "LSH",
    "ChunkedFeedForward",
    "Exact",
    "LSHSelfAttention",
    "Linear",
    "Mechanism",
    "MultiheadAttention",
    "ReversibleBlock",
    "ReversibleSequence",
    "chunked_cross_entropy",
    "recomputing",
]
