"""What a user may ask for when a model is loaded."""

from __future__ import annotations

from typing import Literal

Profile = Literal["exact", "fast"]
Dtype = Literal["float32", "bfloat16"]

PROFILES: tuple[Profile, ...] = ("exact", "fast")
