"""A simulated MiMo API: the four addresses of the real one, with seeded answers, limits and faults, and a ledger.

`python -m ops.simulator` is a process of its own; `running_simulator()` a thread in this one. It imports nothing of
mimoq, so it can judge it.
"""

from ops.simulator.asks import digest
from ops.simulator.config import Config, ConfigError, configure
from ops.simulator.faults import FAULTS
from ops.simulator.running import RunningSimulator, running_simulator
from ops.simulator.server import Simulator, serve

__all__ = [
    "FAULTS",
    "Config",
    "ConfigError",
    "RunningSimulator",
    "Simulator",
    "configure",
    "digest",
    "running_simulator",
    "serve",
]
