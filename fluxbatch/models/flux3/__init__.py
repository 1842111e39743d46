"""FLUX.3: three groups of tokens with blocks of their own before joint ones, and Qwen3-VL's language model."""
