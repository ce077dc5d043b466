"""WebDataset tars, by index or as streams."""
