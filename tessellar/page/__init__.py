"""A page to play with (`tessellar demo`): draw, watch, in-paint, reconstruct, compare.

`watching`: an image entity by entity; `material`: pictures and masks from the page; `charts`: tokens,
entropies and evaluations as pictures; `widgets`: the page itself, which alone needs Gradio (extra
`demo`).
"""
