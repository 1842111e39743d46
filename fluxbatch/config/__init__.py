"""The job's configuration: its schema, the checks of it, and the Hydra application."""
