"""`mimoq token`: the tokens of the API, made, listed and revoked."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from producers.options import DataDir, connected, effective

app = typer.Typer(help="Make, list and revoke tokens of the API.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def create(
    name: Annotated[str, typer.Option(metavar="NAME", help="What it is called in lists and when it is revoked.")],
    scope: Annotated[str, typer.Option(metavar="LIST", help="What it may do: submit, read.")] = "submit,read",
    rpm: Annotated[int | None, typer.Option(metavar="N", min=1, help="HTTP requests a minute.")] = None,
    same_tenant_as: Annotated[
        str | None, typer.Option(metavar="NAME", help="See the jobs of this token; else none but its own.")
    ] = None,
    data_dir: DataDir = None,
) -> int:
    """Make a token and print it alone; nobody can show it again."""
    from jobs import tokens

    scopes = [part.strip() for part in scope.split(",") if part.strip()]
    with connected(effective(data_dir=data_dir)) as connection:
        client = connection.client
        tenant = None if same_tenant_as is None else tokens.named(tokens.all_tokens(client), same_tenant_as).tenant
        print(tokens.create(client, name, scopes, rpm, tenant))
    return 0


@app.command(name="list")
def list_tokens(data_dir: DataDir = None) -> int:
    """List the tokens, oldest first; none shows its secret."""
    from jobs import tokens

    with connected(effective(data_dir=data_dir)) as connection:
        found = tokens.all_tokens(connection.client)
    for token in found:
        created = datetime.fromtimestamp(token.created_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        rpm = "" if token.rpm is None else f"  rpm {token.rpm}"
        print(f"{token.id}  {token.name}  tenant {token.tenant}  {','.join(token.scopes)}{rpm}  {created}")
    if not found:
        print("no tokens")
    return 0


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name or id.")], data_dir: DataDir = None
) -> int:
    """Revoke a token; the jobs of its tenant stay."""
    from jobs import tokens
    from producers.source import say

    with connected(effective(data_dir=data_dir)) as connection:
        found = tokens.revoke(connection.client, name)
    say(f"token {found.name} ({found.id}) is revoked")
    return 0
