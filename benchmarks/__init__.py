"""Benchmarks that are run by hand; ``lmcache bench`` has those that users run."""
