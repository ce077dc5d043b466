"""Training methods that go with several generators."""
