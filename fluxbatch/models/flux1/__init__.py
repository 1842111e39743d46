"""FLUX.1: transformer, text encoders and key tables."""
