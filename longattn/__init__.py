"""Long-context attention for PyTorch: fused kernels with exact gradients, SDPA-like functions, a drop-in module.

Importing this package loads no Triton, touches no GPU, compiles nothing and writes nothing.
"""

from . import features, nn
from ._version import __version__
from .favor import Favor
from .lsh import lsh_buckets, lsh_recall
from .nn.auto import Auto
from .nn.convert import convert
from .nn.local import Local
from .nn.lsh import LSH
from .nn.mechanisms import Linear
from .nn.replace import ReplacementReport, replace_attention, restore_attention
from .nn.replay import recomputing
from .nn.report import FidelityReport, fidelity_report
from .nn.rpe import NPRF
from .ops._dispatch import explain
from .ops.linear import LinearAttentionOutput, linear_attention, linear_attention_with_state
from .ops.lsh import lsh_attention
from .ops.reversible import reversible_add
from .ops.softmax import softmax_attention
from .ops.toeplitz import toeplitz_matvec
from .profile import profile_memory
from .state import FavorState, LinearState, ToeplitzState

__all__ = [
    "LSH",
    "NPRF",
    "Auto",
    "Favor",
    "FavorState",
    "FidelityReport",
    "Linear",
    "LinearAttentionOutput",
    "LinearState",
    "Local",
    "ReplacementReport",
    "ToeplitzState",
    "__version__",
    "convert",
    "explain",
    "features",
    "fidelity_report",
    "linear_attention",
    "linear_attention_with_state",
    "lsh_attention",
    "lsh_buckets",
    "lsh_recall",
    "nn",
    "profile_memory",
    "recomputing",
    "replace_attention",
    "restore_attention",
    "reversible_add",
    "softmax_attention",
    "toeplitz_matvec",
]
