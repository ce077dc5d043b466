"""Networks: vision foundation models, and what a network is (facts, hashes, never the evaluator's)."""
