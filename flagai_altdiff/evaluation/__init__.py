"""Measures how well a model follows its prompts."""
