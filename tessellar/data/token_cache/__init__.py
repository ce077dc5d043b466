"""Token caches: written once, trained from many times."""
