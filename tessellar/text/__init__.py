"""Text: captions as token ids or features. Hugging Face's packages come with the extra `text`."""
