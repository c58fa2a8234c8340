"""Benchmarks: each compares within one run on one machine, or with what its upstream permitted, and prints tables."""
