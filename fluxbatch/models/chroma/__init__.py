"""Chroma: FLUX.1's blocks under a modulation that a small network makes of time alone, and T5 for the prompt."""
