"""Weights on disk: safetensors files and folders as Transformers writes them."""
