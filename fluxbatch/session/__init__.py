"""A run from its opening to its closing status: what a command needs before a weight is read, and what it leaves."""
