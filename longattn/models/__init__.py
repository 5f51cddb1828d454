"""Small whole models that show the parts together."""

from .byte_lm import ByteLM
from .reformer import Reformer
from .reformer_config import ReformerConfig

__all__ = ["ByteLM", "Reformer", "ReformerConfig"]
