"""Quantities for people."""


def seconds(x: float) -> str:
    """0.00012 -> 120 us, 0.34 -> 340 ms, 5.21 -> 5.21 s, 300 -> 5.0 min: three digits and a unit."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        if x < limit:
            return f"{digits(x * factor)} {unit}"
    return f"{x / 60:,.1f} min" if x < 7200 else f"{x / 3600:,.1f} h"


def size(x: float) -> str:
    """Bytes in decimal units."""
    for limit, factor, unit in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if x < limit:
            return f"{digits(x / factor)} {unit}"
    return f"{digits(x / 1e12)} TB"


def digits(x: float) -> str:
    """Three digits, never in the form 1e+03."""
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}"
