"""`make bench-limits`: how much of a provider's limits is used, and what is lost when the provider misbehaves.

Each scenario has a simulator, a store and workers of its own, all of them processes on this machine, and is measured
from the simulator's ledger: the upstream's own view, by times of arrival.
"""
