"""Floats as text that keeps every bit."""

from __future__ import annotations


def hex_float(value: float) -> str:
    """As C's printf("%a") writes a finite double: 0x1.8p+1 for 3.0. `float.fromhex` reads it back."""
    digits, exponent = float(value).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}p{exponent}"
