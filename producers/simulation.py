"""The MiMo simulator as a process that belongs to a command, for `--simulate`."""

from __future__ import annotations

from pydantic import SecretStr

from jobs.settings import Settings
from producers.service import Service


class Simulation(Service):
    """A simulator on a free loopback port; it ends with the command, however that ends."""

    def __init__(self) -> None:
        super().__init__("the simulator", ["ops.simulator", "--exit-with-parent"])


def simulated(settings: Settings) -> Settings:
    """The settings of a command that simulates.

    With a key of its own, so that no gate of the real account is taken for the simulator's.
    """
    return settings.model_copy(update={"simulated": True, "api_key": SecretStr("simulated")})
