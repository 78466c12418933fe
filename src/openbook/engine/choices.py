"""What a user may ask for when a model is loaded."""

from __future__ import annotations

from typing import Literal

Profile = Literal["exact", "fast"]
Dtype = Literal["float32", "bfloat16"]

# What keys and values are kept as; int8 with a scale for each 32 features of a key and for each value.
CacheKind = Literal["float32", "int8"]

CACHE_KINDS: tuple[CacheKind, ...] = ("float32", "int8")
PROFILES: tuple[Profile, ...] = ("exact", "fast")
