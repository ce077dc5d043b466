"""Replays of recorded training methods, which belong to no folder of a paper."""
