"""What several tokenizers share."""
