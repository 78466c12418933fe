"""Which runner computes a model."""

from __future__ import annotations

from openbook.checkpoint.model_source import ModelSource
from openbook.engine.runner import Runner


def choose_runner(source: ModelSource, device: str, dtype: str) -> Runner:
    """Load a model's weights into the runner that serves it best.

    Today that is always the one that computes with torch. A native one is chosen here, before torch is imported.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32" or "bfloat16", of weights and activations.

    Raises:
        UserError: an unknown device or dtype, a file is missing or damaged, or there is too little memory.
    """
    from openbook.engine.torch_runner import load_runner

    return load_runner(source, device, dtype)
