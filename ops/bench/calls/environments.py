"""The peers' environments: a virtual one for each, with the versions that `peers.toml` pins, kept until those change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

PINS = Path(__file__).with_name("peers.toml")
#: Beside what the project itself runs in.
FOLDER = Path(sys.prefix) / "bench"
INSTALL_S = 300.0


class NotInstalled(Exception):
    """A peer's environment can't be made; the message says why, in a line."""


def pins() -> dict[str, list[str]]:
    """What each peer needs, by its name."""
    return {name: table["requirements"] for name, table in tomllib.loads(PINS.read_text()).items()}


@cache
def python(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made if need be. Raises `NotInstalled`."""
    return made(FOLDER / peer, pins()[peer])


def made(folder: Path, requirements: list[str]) -> Path:
    """The interpreter of an environment with these requirements. Raises `NotInstalled`."""
    stamp, interpreter = folder / "requirements.json", folder / "bin" / "python"
    wanted = json.dumps({"python": sys.version, "requirements": requirements})
    if interpreter.exists() and stamp.exists() and stamp.read_text() == wanted:
        return interpreter
    shutil.rmtree(folder, ignore_errors=True)
    # An index that does not answer is a reason to say so, not to wait for it.
    pip = ["-m", "pip", "--disable-pip-version-check", "--retries", "1", "install", "--quiet", *requirements]
    for argv in ([sys.executable, "-m", "venv", str(folder)], [str(interpreter), *pip]):
        try:
            ran = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_S, env=environment())
        except subprocess.TimeoutExpired:
            raise NotInstalled(f"not within {INSTALL_S:.0f} s") from None
        except OSError as error:
            raise NotInstalled(error.strerror or type(error).__name__) from None
        if ran.returncode != 0:
            raise NotInstalled(_reason(f"{ran.stdout}\n{ran.stderr}"))
    stamp.write_text(wanted)  # the last act: an interrupted install leaves none
    return interpreter


def environment() -> dict[str, str]:
    """Ours, without what would lead another interpreter to our modules."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def _reason(output: str) -> str:
    """What pip, or venv, gives as its error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it said nothing"])[-1]


def versions() -> list[str]:
    """`name version` of all that is pinned."""
    requirements = (requirement for peer in pins().values() for requirement in peer)
    return [f"{each.partition('==')[0].partition('[')[0]} {each.partition('==')[2]}" for each in requirements]
