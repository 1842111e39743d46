"""A toy model family: one text encoder, latents of patch 1, a clean-image prediction, a cosine schedule."""
