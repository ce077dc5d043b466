"""Test-time search: several token sequences of one prompt are explored, a verifier scores their images,
the best is kept ("(1D) Ordered Tokens Enable Efficient Test-Time Search", arXiv 2604.15453).

`schedules`: how many entities each step adds; `priors`: what proposes them; `verifiers` and `judges`: what scores
them; `best_of`, `beam`: the searches; `journal`: resuming; `run`: a set of images.
"""
