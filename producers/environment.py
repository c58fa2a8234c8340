"""The settings of a command as its child processes get them."""

from __future__ import annotations

from jobs.settings import PREFIX, Settings, as_text


def variables(settings: Settings, **others: str) -> dict[str, str]:
    """The `MIMOQ_...` variables by which a child has these settings; `others`, named as settings are, go before them.

    What a child finds by itself, a default or the working directory's `.env`, need not be among them.
    """
    given = {}
    for name in settings.model_fields_set | {"data_dir", "simulated"}:
        value = getattr(settings, name)
        if value is not None:
            given[name] = as_text(value.get_secret_value() if hasattr(value, "get_secret_value") else value)
    given["data_dir"] = str(settings.data_dir.resolve())
    return {PREFIX + name.upper(): value for name, value in (given | others).items()}
