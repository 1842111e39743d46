"""Checkpoints: find, read, match, stream onto devices, convert."""
