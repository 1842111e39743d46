"""Rows as batches and shards, and which replica generates which."""
