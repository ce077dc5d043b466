"""Editing: some tokens of a picture are kept, the others are drawn anew by a generator.

`given`: the law of the free tokens, and when it is exact; `edits`: what is kept (in-painting, out-painting,
continuation, class edit, class interpolation, token swap); `run`: a set of images.
"""
