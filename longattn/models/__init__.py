"""Small whole models that show the parts together."""

from .byte_lm import ByteLM

__all__ = ["ByteLM"]
