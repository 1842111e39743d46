"""One interface to local disk and buckets, and the caches on top of it."""
