"""Checkpoints: our own files, written and read: descriptions, weights, exports, fingerprints, the
hub.
"""
