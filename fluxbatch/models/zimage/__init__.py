"""Z-Image: text and image with blocks of their own before joint ones, Qwen3, and FLUX.1's VAE."""
