"""Alignment: what people (or a checker) prefer becomes what the model does."""
