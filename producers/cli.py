"""The command line `mimoq`.

Logs and progress go to stderr always; stdout carries only what was asked for. Everything heavy is imported by the command
that needs it, because `mimoq --help` should not wait for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from jobs.errors import MimoqError
from producers import tokens_cli
from producers.options import DataDir, connected, effective
from producers.workers import Workers

app = typer.Typer(
    name="mimoq",
    help="A durable job queue for LLM completions on the MaaS MiMo API.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(tokens_cli.app, name="token")

CHAT = "/v1/chat/completions"

Endpoint = Annotated[str, typer.Option(metavar="URL", help="Endpoint of lines that name none.")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Model of lines that name none.")]
Input = Annotated[str, typer.Argument(metavar="IN", help="File of JSON lines; - reads standard input.")]
Lane = Annotated[str, typer.Option(help="interactive (someone waits) or bulk.")]


def main(prepared: Workers | None = None) -> int:
    """Runs the command that `sys.argv` names and returns the exit status; `prepared` is for a run's workers."""
    try:
        status = app(standalone_mode=False, obj=prepared)
    except MimoqError as error:
        print(f"mimoq: {error}", file=sys.stderr)
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    except Exception as error:
        status = _usage(error)
    return _flushed(status if isinstance(status, int) else 0)


def _flushed(status: int) -> int:
    """The exit status when all has been written to stdout, or can't be.

    `mimoq results BATCH | head` ends quietly, but not by SIGPIPE: a connection that Redis closed must not end a run.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        if not status:
            print(f"mimoq: stdout can't be written: {error.strerror}", file=sys.stderr)
        return status or 1
    return status


def _usage(error: Exception) -> int:
    """Errors of the command line's own parser; anything else is a fault of ours and shows itself."""
    import click

    # typer may carry a click of its own
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ClickException" in names or isinstance(error, click.ClickException):
        show: Any = error
        show.show(sys.stderr)
        return int(show.exit_code)
    if names & {"Abort", "Exit"}:
        return int(getattr(error, "exit_code", 130))
    raise error


@app.command()
def run(
    context: typer.Context,
    source: Input,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Answers (IN.out.jsonl).")
    ] = None,
    errors: Annotated[Path | None, typer.Option(metavar="FILE", help="Failures (OUT.errors.jsonl).")] = None,
    endpoint: Endpoint = CHAT,
    model: Model = None,
    rpm: Annotated[int | None, typer.Option(metavar="N", help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(metavar="N", help="Tokens a minute.")] = None,
    max_in_flight: Annotated[int | None, typer.Option(metavar="N", help="Calls in flight at once.")] = None,
    max_attempts: Annotated[int | None, typer.Option(metavar="N", min=1, help="Attempts of one job.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", min=0, help="Worker processes (1).")] = None,
    data_dir: DataDir = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Call failed rows again.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew; call every row.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over a file of something else.")] = False,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Run the good lines.")] = False,
    simulate: Annotated[bool, typer.Option("--simulate", help="Use the simulator, not MiMo.")] = False,
    json: Annotated[bool, typer.Option("--json", help="A summary as the last line on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> int:
    """Answer a file of requests: JSON lines in, JSON lines out. Run again, it goes on where it stopped."""
    from producers.run import Run, RunOptions

    settings = effective(model=model, rpm=rpm, tpm=tpm, max_in_flight=max_in_flight, data_dir=data_dir)
    options = RunOptions(
        source=source,
        output=output,
        errors=errors,
        endpoint=endpoint,
        workers=workers,
        max_attempts=max_attempts,
        retry_failed=retry_failed,
        fresh=fresh,
        overwrite=overwrite,
        simulate=simulate,
        skip_invalid=skip_invalid,
        json=json,
        quiet=quiet,
    )
    return Run(options, settings, context.obj or Workers()).run()


@app.command()
def validate(source: Input, endpoint: Endpoint = CHAT, model: Model = None, data_dir: DataDir = None) -> int:
    """Judge a file of requests and submit nothing."""
    from jobs.errors import UsageError
    from producers.reader import Defaults
    from producers.source import judge, opened_input, say

    settings = effective(model=model, data_dir=data_dir)
    defaults = Defaults(_endpoint(endpoint), None if settings.endpoint_path else settings.model)
    with opened_input(source, settings.data_dir) as (file, _):
        try:
            report = judge(file, defaults, settings, skip_invalid=False)
        except UsageError as error:
            say(f"mimoq: {error}")
            return error.exit_code
    say(f"{report.total:,} requests, all good")
    return 0


def _endpoint(endpoint: str) -> str:
    from jobs.errors import UsageError
    from jobs.requests import ENDPOINTS

    if endpoint not in ENDPOINTS:
        raise UsageError(f"--endpoint must be one of {', '.join(ENDPOINTS)}")
    return endpoint


@app.command()
def submit(
    source: Input,
    endpoint: Endpoint = CHAT,
    model: Model = None,
    lane: Lane = "bulk",
    max_attempts: Annotated[int | None, typer.Option(metavar="N", min=1, help="Attempts of one job.")] = None,
    deadline_s: Annotated[
        float | None, typer.Option("--deadline", metavar="SECONDS", help="What has not ended by then expires.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The same key again gives the same batch.")
    ] = None,
    data_dir: DataDir = None,
) -> int:
    """Queue a file of requests for workers; prints the batch id alone."""
    from producers.producer import new_batch
    from producers.reader import Defaults, requests
    from producers.source import judge, opened_input, say

    settings = effective(model=model, data_dir=data_dir)
    defaults = Defaults(_endpoint(endpoint), None if settings.endpoint_path else settings.model)
    new = new_batch(settings, lane, max_attempts, deadline_s, idempotency_key)
    with opened_input(source, settings.data_dir) as (file, _):
        report = judge(file, defaults, settings, skip_invalid=False)
        file.seek(0)
        found = requests(file, defaults, settings.max_line_bytes, report)
        good = (request for _, request in found if not isinstance(request, Exception))
        with connected(settings) as connection:
            batch_id, jobs, created = connection.store.submit(good, new)
            print(batch_id, flush=True)  # before the rings, for which a broker may let us wait
            if created:
                connection.ring(batch_id, lane, "", jobs)
            else:
                say(f"batch {batch_id} of this idempotency key was there already; nothing was submitted again")
    return 0


@app.command()
def status(
    batch: Annotated[str | None, typer.Argument(metavar="BATCH", help="One batch; without it, the newest.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a batch.")] = False,
    data_dir: DataDir = None,
) -> int:
    """Show batches, workers, and gates that are shut."""
    from producers.status import show_status

    with connected(effective(data_dir=data_dir)) as connection:
        show_status(connection, batch, json)
    return 0


@app.command()
def results(
    batch: Annotated[str, typer.Argument(metavar="BATCH")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Write here, not to stdout.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for the rest as it comes.")] = False,
    data_dir: DataDir = None,
) -> int:
    """Print what is finished of a batch as output lines, failures included."""
    from jobs.errors import UsageError
    from producers.follow import Follower

    with connected(effective(data_dir=data_dir)) as connection:
        follower = Follower(connection.store, batch)
        try:
            sink = output.open("wb") if output is not None else sys.stdout.buffer
        except OSError as error:
            raise UsageError(f"{output}: {error.strerror}") from None
        try:
            for lines in follower.followed(follower.lines) if follow else follower.lines():
                sink.write(lines)
                if follow:
                    sink.flush()
            sink.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MimoqError(f"{output or 'stdout'} can't be written: {error.strerror}") from None
        finally:
            if output is not None:
                with contextlib.suppress(OSError):  # what a full disk left in its buffer
                    sink.close()
    return 0


@app.command()
def cancel(batch: Annotated[str, typer.Argument(metavar="BATCH")], data_dir: DataDir = None) -> int:
    """Cancel a batch: queued jobs at once, those in flight within seconds; answers that came are kept."""
    from producers.producer import cancel as cancel_batch
    from producers.source import say

    with connected(effective(data_dir=data_dir)) as connection:
        found = cancel_batch(connection.store, batch)
    counts = f"{found.cancelled:,} cancelled, {found.succeeded:,} answered, {found.running:,} still in flight"
    say(f"batch {found.batch_id}: {counts}")
    return 0


@app.command()
def pause(batch: Annotated[str, typer.Argument(metavar="BATCH")], data_dir: DataDir = None) -> int:
    """Pause a batch: nothing more of it is called until it is resumed; calls in flight end."""
    return _set_paused(batch, data_dir, paused=True)


@app.command()
def resume(batch: Annotated[str, typer.Argument(metavar="BATCH")], data_dir: DataDir = None) -> int:
    """Let a paused batch go on, whether it was paused by hand or because its first jobs all failed alike."""
    return _set_paused(batch, data_dir, paused=False)


def _set_paused(batch: str, data_dir: Path | None, *, paused: bool) -> int:
    from producers.source import say

    with connected(effective(data_dir=data_dir)) as connection:
        state = connection.store.pause(batch) if paused else connection.store.resume(batch)
    say(f"batch {batch} is {state}")
    return 0


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="Address the API listens on (127.0.0.1).")] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", min=0, max=65535, help="Its port (8000); 0: a free one.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Worker processes for each lane.")] = 1,
    simulate: Annotated[bool, typer.Option("--simulate", help="Use the simulator, not MiMo.")] = False,
    data_dir: DataDir = None,
) -> int:
    """Start store, workers and API on this machine; print address, token and a line to try it with."""
    from producers.serve import Serve, ServeOptions

    settings = effective(api_host=host, api_port=port, data_dir=data_dir)
    return Serve(ServeOptions(workers, simulate), settings, context.obj or Workers()).run()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def api(context: typer.Context) -> NoReturn:
    """Run the HTTP API (--host, --port)."""
    _become("api", context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def worker(context: typer.Context) -> NoReturn:
    """Run workers that take jobs off the queues (--lane, --processes)."""
    _become("worker", context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def simulator(context: typer.Context) -> NoReturn:
    """Run the MiMo simulator (--port, --latency, --rpm and more)."""
    _become("ops.simulator", context.args)


def _become(module: str, args: list[str]) -> NoReturn:
    """This process goes on as another entry point; the producers import nothing of it."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *args])  # noqa: S606 - it needs no shell


@app.command()
def config(data_dir: DataDir = None) -> int:
    """Print the effective settings, secrets masked, and where each came from."""
    from jobs.settings import sources

    settings = effective(data_dir=data_dir)
    for name, value, source in sources(settings, data_dir=data_dir):
        print(f"{name}={value}  # {source}")
    return 0
