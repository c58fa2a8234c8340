"""How many tokens a call will take, before it is made: what the limiter reserves and corrects afterwards.

Prompt: bytes of the body by a ratio learned from real usage of the model. Completion: a running mean per batch, begun at
the body's own limit or `FIRST_COMPLETION`, whichever is less (never the limit blindly: 131,072 would starve the queue).
"""

from __future__ import annotations

from collections import OrderedDict

from jobs.results import Usage
from worker.run import Run

FIRST_COMPLETION = 1024
FIRST_BYTES_PER_TOKEN = 4.0
#: Weight of the newest value in the running means.
WEIGHT = 0.05
#: Batches and models whose means are kept.
KEPT = 1000


class Estimates:
    """Running means, by model for prompts and by batch for completions."""

    def __init__(self) -> None:
        self._bytes_per_token: OrderedDict[str, float] = OrderedDict()
        self._completion: OrderedDict[str, float] = OrderedDict()

    def of(self, run: Run) -> int:
        """Tokens to reserve for one call of this job."""
        ratio = self._bytes_per_token.get(run.model, FIRST_BYTES_PER_TOKEN)
        completion = self._completion.get(run.job.batch_id, FIRST_COMPLETION)
        if run.most_tokens is not None:
            completion = min(completion, run.most_tokens)
        return max(1, round(len(run.job.request.body) / ratio + completion))

    def learn(self, run: Run, usage: Usage) -> None:
        """Takes in what a call really took."""
        if usage.prompt_tokens > 0:
            _learn(self._bytes_per_token, run.model, len(run.job.request.body) / usage.prompt_tokens)
        if usage.completion_tokens > 0:
            _learn(self._completion, run.job.batch_id, float(usage.completion_tokens))


def _learn(means: OrderedDict[str, float], name: str, value: float) -> None:
    before = means.get(name)
    means[name] = value if before is None else before + WEIGHT * (value - before)
    means.move_to_end(name)
    if len(means) > KEPT:
        means.popitem(last=False)
