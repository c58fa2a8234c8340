"""Benchmarks: each prints a table of ratios within one run on one machine."""
