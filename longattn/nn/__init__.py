"""Modules: the drop-in for torch.nn.MultiheadAttention and the descriptions of what runs inside it."""

from .attention import MultiheadAttention
from .lsh import LSH, LSHSelfAttention
from .mechanisms import Exact, Linear, Mechanism

__all__ = ["LSH", "Exact", "LSHSelfAttention", "Linear", "Mechanism", "MultiheadAttention"]
