"""Feature networks (extractors): what distances are measured with."""
