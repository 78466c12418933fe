"""Which runner computes a model."""

from __future__ import annotations

from openbook.checkpoint.model_source import ModelSource
from openbook.core.errors import UserError
from openbook.engine.choices import CACHE_KINDS, PROFILES, CacheKind, Dtype, Profile
from openbook.engine.runner import Runner


def choose_runner(
    source: ModelSource, device: str, dtype: Dtype | None, profile: Profile | None, cache: CacheKind | None = None
) -> Runner:
    """Load a model's weights into the runner that serves it best.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        dtype: of weights and activations in the profile fast, float32 if None; the exact one takes weights as they are
            stored and computes in float32.
        profile: None is exact where the whole model is native code, on a CPU with no dtype asked for, else fast.
        cache: of keys and values, for models that are native code whole; float32 if None.

    Raises:
        UserError: an unknown device, dtype, profile or cache, two that exclude each other, a file is missing or
            damaged, or there is too little memory.
    """
    if cache not in (*CACHE_KINDS, None):
        raise UserError(f"the cache {cache!r} is unknown: expected {' or '.join(CACHE_KINDS)}; correct it")
    if profile not in (*PROFILES, None):
        raise UserError(f"the profile {profile!r} is unknown: expected {' or '.join(PROFILES)}; correct it")
    if profile == "exact" and (device != "cpu" or dtype is not None):
        given = f"the device {device}" if device != "cpu" else f"the dtype {dtype}"
        raise UserError(
            f"{given} was asked for together with the profile exact, which computes on a CPU in float32: leave it out, "
            "or use profile fast"
        )
    from openbook.checkpoint.raw_weights import RAW_FAMILIES
    from openbook.ops.native_module import has_native

    is_native = source.config.model_type in RAW_FAMILIES
    # Whoever chooses a cache is told if there is no native core, and not given the profile fast.
    is_exact = profile == "exact" or (
        profile is None and device == "cpu" and dtype is None and is_native and (cache is not None or has_native())
    )
    if cache is not None and not (is_exact and is_native):
        raise UserError(
            f"the cache {cache} was asked for, but only dense decoders in the profile exact have a choice: leave it out"
        )
    if is_exact and not is_native:
        from openbook.engine.torch_runner import load_exact_runner

        return load_exact_runner(source)
    if is_exact:
        from openbook.engine.native_load import load_native

        return load_native(source, cache or "float32")
    from openbook.engine.torch_runner import load_runner

    return load_runner(source, device, dtype or "float32")
