"""Measures: pure functions of tensors that say how good images are."""
