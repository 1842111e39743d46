"""fluxbatch: a manifest of prompts in, FLUX pictures and a metadata manifest out."""

__version__ = "0.1.0"
