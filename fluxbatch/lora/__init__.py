"""LoRA adapters: files, key formats, deltas, and applying them."""
