"""Answers from a model: requests, sampling, generation, and the `Model` that puts them together."""
