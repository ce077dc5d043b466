"""Processes: flow matching, diffusion and adaptive projected guidance, mathematics and drawing of
each in one file.
"""
