"""Protocol: what a tokenizer, a generator and a decoder may ask of each other."""
