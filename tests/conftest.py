"""Settings for all tests: one thread, so that two test processes do not fight, and repeatable property-based tests."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("repeatable")
