"""Data sets, each with its DataModule."""
