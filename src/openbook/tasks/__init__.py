"""Reasoning tasks: problems, worked solutions, scores."""
