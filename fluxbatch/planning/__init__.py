"""What a run needs and costs, without running it."""
