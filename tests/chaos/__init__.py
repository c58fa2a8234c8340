"""Chaos: real workers, a real Valkey and a simulated upstream, all of them harmed at random, and a ledger that judges.

`pytest tests/chaos` is the short form, `python -m tests.chaos --minutes M --seed S` the long one; `--kills` and `--rolling`
are the figures of a kill and of a rolling deploy. What happens when, and to whom, follows from the seed alone.
"""
