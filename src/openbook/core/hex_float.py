"""Floats as text that keeps every bit."""

from __future__ import annotations


def hex_float(value: float) -> str:
    """As C's printf("%a") writes a double: 0x1.8p+1 for 3.0, inf, nan. `float.fromhex` reads it back."""
    digits, mark, exponent = float(value).hex().partition("p")
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}{mark}{exponent}"
