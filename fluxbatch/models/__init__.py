"""The networks as Flax modules: shared layers, and one folder a model family."""
