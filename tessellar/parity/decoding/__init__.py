"""Replays of recorded decoding algorithms, one file a recording."""
