"""Modules: the drop-in for torch.nn.MultiheadAttention and the descriptions of what runs inside it."""

from .attention import MultiheadAttention
from .auto import Auto
from .chunked import ChunkedFeedForward, chunked_cross_entropy
from .local import Local
from .lsh import LSH, LSHSelfAttention
from .mechanisms import Exact, Linear, Mechanism
from .positions import AxialPositionalEmbedding, Rotary
from .replay import recomputing
from .reversible import ReversibleBlock, ReversibleSequence
from .rpe import NPRF, RelativeBias

__all__ = [
    "LSH",
    "NPRF",
    "Auto",
    "AxialPositionalEmbedding",
    "ChunkedFeedForward",
    "Exact",
    "LSHSelfAttention",
    "Linear",
    "Local",
    "Mechanism",
    "MultiheadAttention",
    "RelativeBias",
    "ReversibleBlock",
    "ReversibleSequence",
    "Rotary",
    "chunked_cross_entropy",
    "recomputing",
]
