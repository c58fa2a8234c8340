"""`python -m ops.health`: whether the mimoq of this container works; what the image's health check asks.

It looks for mimoq's processes in /proc and asks each over loopback: the API whether it serves, a worker, at the port of its
metrics, whether its engine turns and hears the store. A container that runs another command, or whose workers have no
such port, is well as long as it runs. It imports nothing of mimoq's, because it is started every few seconds.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

#: Seconds that one process gets to answer.
ANSWER_S = 2.0
#: What a worker says of a store that answers it; `mimoq_worker_store_up` of docs/metrics.md.
STORE_UP = b"\nmimoq_worker_store_up 1.0\n"


def main(proc: Path = Path("/proc"), environ: Mapping[str, str] = os.environ) -> int:
    """0 when every process answers well, else 1, with a line for each that does not."""
    ill = [line for argv in commands(proc) for line in complaints(argv, environ)]
    for line in ill:
        print(line)
    return 1 if ill else 0


def commands(proc: Path) -> Iterator[list[str]]:
    """Of each process of mimoq, the module that it runs, and its arguments."""
    for path in sorted(proc.glob("[0-9]*/cmdline")):
        try:
            argv = path.read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:  # it has ended meanwhile
            continue
        if "-m" in argv[:-1]:
            yield argv[argv.index("-m") + 1 :]


def complaints(argv: list[str], environ: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with one process; nothing where it is well, or can't be asked."""
    module, *args = argv
    port = environ.get("MIMOQ_METRICS_PORT")
    if module == "api":
        if ask(int(option(args, "--port") or environ.get("MIMOQ_API_PORT") or 8000), "/healthz") is None:
            yield "the API does not answer"
    elif module == "worker" and port and (place := option(args, "--place") or alone(args)):
        said = ask(int(port) + int(place), "/")
        if said is None:
            yield f"worker {place} does not answer"
        elif STORE_UP not in said:
            yield f"worker {place} does not hear its store"


def option(args: list[str], name: str) -> str | None:
    """The value of an option, None where it is not given."""
    for place, given in enumerate(args):
        if given == name:
            return next(iter(args[place + 1 :]), None)
        if given.startswith(f"{name}="):
            return given.partition("=")[2]
    return None


def alone(args: list[str]) -> str:
    """The place of a worker that nobody supervises: 0; '' of a supervisor, which has no port of its own."""
    return "0" if option(args, "--lane") and option(args, "--processes") in (None, "1") else ""


def ask(port: int, path: str) -> bytes | None:
    """What is answered with 200 at this port of loopback, None for anything else."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        said = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return said if answer.status == 200 else None


if __name__ == "__main__":
    sys.exit(main())
