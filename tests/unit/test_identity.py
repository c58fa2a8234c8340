"""Digests: alike for the same, different for others, and never showing what they stand for."""

from __future__ import annotations

import itertools
import re
from typing import Any

from pydantic import SecretStr

from jobs import identity
from jobs.settings import Settings

KEY = "sk-very-secret"


def settings(**values: Any) -> Settings:
    return Settings(**values)


def test_an_account_is_a_digest_of_its_key() -> None:
    found = identity.account(KEY)
    assert re.fullmatch("[0-9a-f]{16}", found)
    assert found == identity.account_of(settings(api_key=SecretStr(KEY)))
    assert found != identity.account(KEY + " ")
    assert identity.account_of(settings()) == identity.account("")


def test_a_label_names_the_upstream_and_not_the_key() -> None:
    here = settings(base_url="https://a.example")
    found = [
        identity.label(here),
        identity.label(settings(base_url="https://b.example")),
        identity.label(settings(base_url="https://a.example", endpoint_path="p")),
        identity.label(settings(base_url="http://127.0.0.1:1", simulated=True)),
    ]
    assert len(set(found)) == 4
    assert all(re.fullmatch("[0-9a-f]{8}", label) for label in found[:3])
    assert found[3] == identity.SIMULATED
    assert identity.label(settings(base_url="https://a.example", api_key=SecretStr(KEY), rpm=5)) == found[0]


def test_every_simulator_is_the_same_upstream() -> None:
    ports = [identity.label(settings(base_url=f"http://127.0.0.1:{port}", simulated=True)) for port in (1, 2)]
    assert len(set(ports)) == 1


def test_a_worker_takes_its_own_work_and_unbound_work_but_a_simulated_one_no_other() -> None:
    real = settings(base_url="https://a.example")
    assert identity.served_labels(real) == [identity.label(real), ""]
    assert identity.served_labels(settings(simulated=True)) == [identity.SIMULATED]


def test_simulated_work_has_queues_of_its_own() -> None:
    names = {
        (lane, label): identity.queue(lane, label) for lane in ("bulk", "interactive") for label in ("", "simulate")
    }
    assert names == {
        ("bulk", ""): "mimoq.bulk",
        ("bulk", "simulate"): "mimoq.simulate.bulk",
        ("interactive", ""): "mimoq.interactive",
        ("interactive", "simulate"): "mimoq.simulate.interactive",
    }
    assert identity.queue("bulk", "a1b2c3d4") == "mimoq.bulk"


def test_a_runs_identity_is_made_of_all_it_is_told() -> None:
    parts = [
        ("c", 0, "e", "m", "u"),
        ("d", 0, "e", "m", "u"),
        ("c", 1, "e", "m", "u"),
        ("c", 0, "f", "m", "u"),
        ("c", 0, "e", None, "u"),
        ("c", 0, "e", "m", "v"),
    ]
    found = [identity.run_identity(*part) for part in parts]
    assert all(one != other for one, other in itertools.combinations(found, 2))
    assert found[0] == identity.run_identity("c", 0, "e", "m", "u")
    assert re.fullmatch("[0-9a-f]{16}", found[0])
