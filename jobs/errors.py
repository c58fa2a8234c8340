"""The errors a user of mimoq can meet, one type per outcome.

Each message is one line that says what to do, and never holds a prompt, an answer or a key. The command line turns
`exit_code` into its exit status; library callers catch the types.
"""

from __future__ import annotations


class MimoqError(Exception):
    """Anything mimoq refuses or could not do; `str(error)` is one line for a person."""

    exit_code = 1


class UsageError(MimoqError):
    """The call or its input is wrong; nothing was submitted."""

    exit_code = 2


class InvalidRequest(UsageError):
    """A request breaks a rule of the MiMo schema; the message names the field and the rule."""


class SchemaVersionError(UsageError):
    """The store was written by another version of mimoq than this one can read."""


class NotFound(UsageError):
    """No batch or job has that id (never had, or its results have expired)."""


class Conflict(UsageError):
    """The same idempotency key came with other requests; nothing was submitted."""


class Unwanted(MimoqError):
    """What was under way is not to go on: somebody has cancelled it, or the process that does it is being stopped."""


class StoreUnavailable(MimoqError):
    """Redis did not answer in time; nothing that was acknowledged is lost."""


class Unanswered(StoreUnavailable):
    """Nobody has answered: what was to be submitted may have been, or may still be."""


class StoreFull(StoreUnavailable):
    """Redis answers but takes nothing more: it is out of memory, or of disk."""


class StoreRefused(StoreUnavailable):
    """Redis can't be used, and waiting would not help: a wrong password, a right that is missing, a name nobody knows."""


class NoRoom(MimoqError):
    """Redis would have no room for the answers of what was to be submitted; nothing was.

    `plain` says so to who must not learn how much others have submitted.
    """

    plain = "no room for the answers in the store; nothing was submitted: try again later, or submit fewer"


class EmbeddedServerError(MimoqError):
    """The embedded Valkey could not be started, or kept dying."""


class KeyRefused(MimoqError):
    """The upstream refuses the API key (401 or 403); no job failed for it."""

    exit_code = 3
