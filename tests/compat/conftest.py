"""The official SDKs, each client made for one server on this machine: no proxy of the environment, no retry unasked for.

The fixtures give functions `(base_url, key, max_retries) -> client`, `base_url` without a path. Clients are closed after the
test; asynchronous ones belong to a loop, and their tests write `async with`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol, TypeVar

import anthropic
import openai
import pytest

KEY = "a-key-of-a-test"

ClientT = TypeVar("ClientT", covariant=True)


class Make(Protocol[ClientT]):
    """Makes a client: `make(url)`, `make(url, token)`, `make(url, token, max_retries=2)`."""

    def __call__(self, base_url: str, key: str = KEY, max_retries: int = 0) -> ClientT: ...


@pytest.fixture
def openai_client() -> Iterator[Make[openai.OpenAI]]:
    """Makes `openai.OpenAI` clients."""
    with ExitStack() as open_clients:

        def make(base_url: str, key: str = KEY, max_retries: int = 0) -> openai.OpenAI:
            http = openai.DefaultHttpxClient(trust_env=False)
            client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=max_retries, http_client=http)
            return open_clients.enter_context(client)

        yield make


@pytest.fixture
def anthropic_client() -> Iterator[Make[anthropic.Anthropic]]:
    """Makes `anthropic.Anthropic` clients."""
    with ExitStack() as open_clients:

        def make(base_url: str, key: str = KEY, max_retries: int = 0) -> anthropic.Anthropic:
            http = anthropic.DefaultHttpxClient(trust_env=False)
            client = anthropic.Anthropic(base_url=base_url, api_key=key, max_retries=max_retries, http_client=http)
            return open_clients.enter_context(client)

        yield make


@pytest.fixture
def async_openai_client() -> Make[openai.AsyncOpenAI]:
    """Makes `openai.AsyncOpenAI` clients, which the test closes."""

    def make(base_url: str, key: str = KEY, max_retries: int = 0) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        return openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=max_retries, http_client=http)

    return make


@pytest.fixture
def async_anthropic_client() -> Make[anthropic.AsyncAnthropic]:
    """Makes `anthropic.AsyncAnthropic` clients, which the test closes."""

    def make(base_url: str, key: str = KEY, max_retries: int = 0) -> anthropic.AsyncAnthropic:
        http = anthropic.DefaultAsyncHttpxClient(trust_env=False)
        return anthropic.AsyncAnthropic(base_url=base_url, api_key=key, max_retries=max_retries, http_client=http)

    return make
