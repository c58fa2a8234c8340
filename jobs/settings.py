"""Every setting of mimoq, in one class.

Values come, first match wins, from the call (command line flags), the environment (`MIMOQ_<NAME>`), a `.env` file in
the working directory, and the defaults below. An empty variable counts as unset. The table in `docs/settings.md` is
made from the descriptions here.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from jobs.errors import UsageError

PREFIX = "MIMOQ_"
DEFAULT_BASE_URL = "https://genaiapi.cloudsway.net"

Positive = Annotated[int, Field(ge=1)]
Status = Annotated[int, Field(ge=100, le=599)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Prices(BaseModel):
    """What a million tokens of one model cost, in whatever currency; `cached` prompt tokens cost as others unless given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Price
    completion: Price
    cached: Price | None = None


class Settings(BaseSettings):
    """The effective settings of one process; secrets never show in its `repr`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    api_key: SecretStr | None = Field(None, description="Key of the upstream account, sent as a bearer token.")
    base_url: str = Field(DEFAULT_BASE_URL, description="Address of the upstream, without a path of an endpoint.")
    endpoint_path: str | None = Field(
        None,
        description="The provider's endpoint path of one model; set, it selects the per-model addresses "
        "(`/v1/ai/<path>/chat/completions`, `/<path>/v1/messages`) instead of the unified ones.",
    )
    allow_insecure_http: bool = Field(
        False, description="Allow `http://` to a host other than loopback. Hands the key to anyone on the way."
    )
    simulated: bool = Field(
        False, description="BASE_URL is a simulator: take simulated batches only. Set by `--simulate` for its workers."
    )
    redis_url: SecretStr | None = Field(
        None, description="The store (`redis://`, `rediss://` or `unix://`). Unset: an embedded Valkey in DATA_DIR."
    )
    broker_url: SecretStr | None = Field(
        None,
        description="Celery broker (`redis://`, `rediss://`, `redis+socket://`, `amqp://` or `amqps://`). Unset: REDIS_URL.",
    )
    queue_type: Literal["quorum", "classic"] = Field(
        "quorum", description="Type of the queues that are made on RabbitMQ; one that is there is used as it is."
    )
    default_queue: Annotated[str, Field(min_length=1)] = Field(
        "celery", description="Queue of a pipeline's tasks that name none: the default queue of the app they are of."
    )
    result_backend: SecretStr | None = Field(None, description="Celery result backend. Unset: REDIS_URL.")
    result_compression: Literal["gzip", "none"] = Field(
        "gzip", description="Compression of stored results; any Celery 5.7 app reads both."
    )
    data_dir: Path = Field(Path(".mimoq"), description="Folder of the embedded Valkey and of spooled input, mode 0700.")
    model: str = Field("MaaS_Mimo_V2.5_20260423", description="Model of requests that name none.")
    rpm: Positive | None = Field(None, description="Requests a minute, per account and model, cluster-wide.")
    tpm: Positive | None = Field(None, description="Tokens a minute, per account and model, cluster-wide.")
    max_in_flight: Positive | None = Field(
        None, description="Calls in flight at once, per account and model, cluster-wide."
    )
    worker_max_in_flight: Positive = Field(512, description="Calls in flight at once in one worker process.")
    slice_size: Annotated[int, Field(ge=1, le=1000)] = Field(50, description="Jobs in one slice.")
    interactive_share: Annotated[float, Field(ge=0, le=0.9)] = Field(
        0.2,
        description="Share of the request and token rates that interactive jobs get first; bulk uses what they leave.",
    )
    estimate_completion_tokens: Positive = Field(
        1024,
        description="Completion tokens reserved for a call of a batch that has no answers yet, or its own limit if less.",
    )
    max_attempts: Positive = Field(5, description="Attempts of one job before it fails; a 429 is not counted.")
    retry_statuses: Annotated[frozenset[Status], NoDecode] = Field(
        frozenset(), description="Further statuses that are retried, as in `402,418`; 429 and 5xx are anyway."
    )
    bad_answers: Annotated[frozenset[Literal["empty_answer", "degenerate_answer"]], NoDecode] = Field(
        frozenset({"empty_answer", "degenerate_answer"}),
        description="Answers that are retried and at last failed, or `none`: `empty_answer` has no content and no tool "
        "call, `degenerate_answer` ended for one of DEGENERATE_FINISH_REASONS.",
    )
    degenerate_finish_reasons: Annotated[frozenset[str], NoDecode] = Field(
        frozenset({"repetition_truncation"}), description="Finish reasons that make an answer a `degenerate_answer`."
    )
    streaming: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Stream upstream and join the pieces. `auto`: if the body says so, or allows over 4,096 tokens.",
    )
    call_timeout_s: Seconds = Field(600.0, description="Seconds one upstream call may take in all.")
    connect_timeout_s: Seconds = Field(10.0, description="Seconds to connect to the upstream.")
    idle_timeout_s: Seconds = Field(
        300.0, description="Seconds without one byte from the upstream, once the call is sent."
    )
    max_line_bytes: Positive = Field(20_000_000, description="Longest accepted input line, in bytes.")
    result_ttl_s: Positive = Field(30 * 86_400, description="Seconds a result is kept, and a batch after its end.")
    store_patience_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        60.0,
        description="Seconds that producers and the command line wait for a store that is away before they give up.",
    )
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        30.0, description="Seconds that calls in flight get to end when a worker is told to stop."
    )
    api_host: str = Field(
        "127.0.0.1", description="Address the API listens on; other than loopback only with API_AUTH."
    )
    api_port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port the API listens on; 0: a free one.")
    api_auth: bool = Field(
        True,
        description="Whether the API asks for a token (`mimoq token create`). Off: it serves this machine's programs alone, "
        "which see what no token has submitted.",
    )
    api_rpm: Positive | None = Field(
        None, description="HTTP requests a minute of one token, over all API processes, unless the token has its own."
    )
    api_max_body_bytes: Positive = Field(
        32_000_000, description="Longest body of an API request, but for a batch sent as JSON lines."
    )
    api_max_upload_bytes: Positive = Field(
        1_000_000_000, description="Longest body of a batch sent as JSON lines; it is read as a stream."
    )
    api_url: str | None = Field(
        None,
        description="Address that clients call the API by, for links in its answers. Unset: as each request names it.",
    )
    files_dir: Path | None = Field(
        None,
        description="Folder of files uploaded to the API, mode 0700; API processes on several machines share one. "
        "Unset: `files` in DATA_DIR.",
    )
    file_max_bytes: Positive = Field(536_870_912, description="Longest uploaded file that is no batch's input.")
    batch_max_bytes: Positive = Field(209_715_200, description="Longest input file of an OpenAI batch.")
    batch_max_requests: Positive = Field(50_000, description="Requests of an OpenAI batch, at most.")
    message_batch_max_bytes: Positive = Field(268_435_456, description="Longest body that creates a message batch.")
    message_batch_max_requests: Positive = Field(100_000, description="Requests of a message batch, at most.")
    sync_timeout_s: Seconds = Field(
        300.0, description="Seconds a waiting call gets its answer in; the job goes on after it, and can be polled."
    )
    api_link_tasks: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Tasks that a `link` may name over the API, as in `reports.done,billing.*@billing`: they reach your own "
        "Celery apps. Each goes to the queue behind its `@`, and without one to MIMOQ_DEFAULT_QUEUE; a link that names "
        "another is refused. `none`: no link is taken.",
    )
    task_events: bool = Field(
        False,
        description="Whether workers send task events from the start, as for Flower, which can also turn them on.",
    )
    webhook_allow_http: bool = Field(
        False, description="Allow webhooks to `http://`, which anyone on the way can read."
    )
    webhook_allow_private: bool = Field(
        False, description="Allow webhooks to private, loopback and link-local addresses: whoever submits reaches them."
    )
    prices: dict[str, Prices] | None = Field(
        None,
        description='Prices of a million tokens, as JSON: `{"MODEL": {"prompt": 0.3, "completion": 1.2, '
        '"cached": 0.03}}`; `*` stands for any other model. Set, jobs show their cost.',
    )
    metrics_host: str = Field("127.0.0.1", description="Address of a worker's own metrics.")
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="Port of a worker's own metrics, counted up over the processes of one command. Unset: none."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["console", "json"] | None = Field(
        None, description="Unset: `console` on a terminal, `json` otherwise."
    )

    @field_validator("log_level", "log_format", "streaming", "result_compression", "queue_type", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("retry_statuses", "bad_answers", "degenerate_finish_reasons", "api_link_tasks", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        names = frozenset(name.strip() for name in value.split(",") if name.strip())
        return frozenset() if names == {"none"} else names

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address like https://host or http://127.0.0.1:8080")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must hold no user, password, query or fragment; the key goes into MIMOQ_API_KEY")
        # The OpenAI SDK's habit of naming the address with its /v1 is forgiven.
        return value.rstrip("/").removesuffix("/v1")

    @field_validator("api_url")
    @classmethod
    def _api_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        # Clients of Anthropic take braces for the names of parts that they are to fill in.
        odd = parts.username or parts.password or parts.query or parts.fragment or any(c in value for c in "{} ")
        if parts.scheme not in ("http", "https") or not parts.hostname or odd:
            raise ValueError("must be an address like https://host or https://host/prefix")
        return value.rstrip("/")

    @field_validator("endpoint_path")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        if value is None:
            return None
        value = value.strip("/")
        if not value or any(c in value for c in "?#%\\ ") or ".." in value.split("/"):
            raise ValueError("must be the plain path that the provider names, like my-endpoint")
        return value

    @field_validator("redis_url", "broker_url", "result_backend")
    @classmethod
    def _server(cls, value: SecretStr | None) -> SecretStr | None:
        # A broker may be one of several, divided by semicolons.
        for address in value.get_secret_value().split(";") if value is not None else ():
            if "://" not in address:
                raise ValueError("must be an address like redis://host:6379/0")
            try:
                _ = urlsplit(address).port
            except ValueError:  # whose message may hold a part of the password
                raise ValueError(
                    "can't be read; in its user and password, write /, #, ?, @ and : as %2F and so on"
                ) from None
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        return value

    @field_validator("api_key")
    @classmethod
    def _key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        key = value.get_secret_value().strip()
        if not key:
            return None
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("must be one word of plain ASCII characters")
        return SecretStr(key)

    @model_validator(mode="after")
    def _no_key_in_the_clear(self) -> Settings:
        parts = urlsplit(self.base_url)
        if parts.scheme == "http" and not self.allow_insecure_http and not is_loopback(parts.hostname or ""):
            raise ValueError(
                "BASE_URL: http:// sends the key in the clear; use https://, or set MIMOQ_ALLOW_INSECURE_HTTP=true"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether a host name of a URL can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_settings(**overrides: Any) -> Settings:
    """The effective settings; an override of None or an empty text counts as not given.

    Raises `UsageError` with one line that names the setting and the rule it breaks.
    """
    given = {name: value for name, value in overrides.items() if value not in (None, "")}
    try:
        return Settings(**given)
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f".env can't be read: {type(error).__name__}; write it in UTF-8") from None
    except ValidationError as error:
        raise UsageError("; ".join(_problem(item) for item in error.errors(include_url=False))) from None


def _problem(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return f"{PREFIX}{message}"
    return f"{PREFIX}{str(item['loc'][0]).upper()}: {message}"


def sources(settings: Settings, **overrides: Any) -> Iterator[tuple[str, str, str]]:
    """`(variable, value with secrets masked, where it came from)` of every setting."""
    from dotenv import dotenv_values

    env_file = {name.upper(): value for name, value in dotenv_values(".env").items()}
    environment = {name.upper(): value for name, value in os.environ.items()}
    for name in type(settings).model_fields:
        variable = PREFIX + name.upper()
        value = getattr(settings, name)
        if overrides.get(name) is not None:
            source = "command line"
        elif environment.get(variable):
            source = "environment"
        elif env_file.get(variable):
            source = ".env"
        else:
            source = "default"
        yield variable, "(unset)" if value is None else as_text(value), source


def as_text(value: object) -> str:
    """A setting's value as a variable spells it; secrets stay masked."""
    if isinstance(value, frozenset):
        return ",".join(sorted(str(item) for item in value)) or "none"
    if isinstance(value, dict):
        return json.dumps({name: item.model_dump(exclude_none=True) for name, item in value.items()})
    return str(value)
