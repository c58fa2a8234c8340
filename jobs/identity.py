"""Digests that name things without showing them: the account of a key, the upstream of a batch, the content of a run."""

from __future__ import annotations

import hashlib

from jobs.settings import Settings

SIMULATED = "simulate"


def account(api_key: str) -> str:
    """The account of a key: a keyed digest, 16 hex digits, from which the key can't be had."""
    return hashlib.blake2b(api_key.encode(), key=b"mimoq account", digest_size=8).hexdigest()


def account_of(settings: Settings) -> str:
    """The account these settings call with; without a key, the digest of none."""
    return account(settings.api_key.get_secret_value() if settings.api_key else "")


def label(settings: Settings) -> str:
    """The upstream these settings call, as batches that are bound to it name it.

    Every simulator is the same upstream, whatever its port; a simulated worker takes nothing else.
    """
    if settings.simulated:
        return SIMULATED
    address = f"{settings.base_url}\n{settings.endpoint_path or ''}"
    return hashlib.blake2b(address.encode(), digest_size=4).hexdigest()


def served_labels(settings: Settings) -> list[str]:
    """The labels whose batches a worker with these settings takes: its own, and batches bound to none."""
    return [SIMULATED] if settings.simulated else [label(settings), ""]


def queue(lane: str, upstream: str) -> str:
    """The Celery queue of a lane (of `mimoq.complete`, too); simulated work has its own, so no real worker hears it."""
    return f"mimoq.{SIMULATED}.{lane}" if upstream == SIMULATED else f"mimoq.{lane}"


def run_identity(content: str, bad: int, endpoint: str, model: str | None, upstream: str) -> str:
    """What makes two runs the same batch: input content, endpoint, model and upstream; 16 hex digits.

    The number of bad lines is part of it, because it changes which jobs the same content makes.
    """
    text = "\n".join(("run", content, str(bad), endpoint, model or "", upstream))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def key_identity(idempotency_key: str) -> str:
    """What an idempotency key is stored as: a keyed digest, 32 hex digits. The key may hold any text."""
    text = idempotency_key.encode(errors="surrogatepass")
    return hashlib.blake2b(text, key=b"mimoq idempotency key", digest_size=16).hexdigest()
