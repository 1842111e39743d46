"""FLUX.2 (klein 4B, 9B and base, dev): its networks, what surrounds them, and the names of their weights."""
