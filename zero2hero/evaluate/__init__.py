"""Evaluation: how good a model is, with how much of it is chance."""
