"""Parity: the machinery of recorded official outputs (`convert.py verify`)."""
