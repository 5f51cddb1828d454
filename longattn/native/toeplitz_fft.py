"""Launchers of csrc/cpu/toeplitz_fft.cpp: those of toeplitz.py, by Fourier transforms."""

from __future__ import annotations

import functools

from . import toeplitz

forward = functools.partial(toeplitz.forward, fft=True)
backward = functools.partial(toeplitz.backward, fft=True)
