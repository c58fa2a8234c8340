"""Webhooks of a tenant: what became of each, another try for one, and what they are signed with."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from api.problems import Problem, not_found
from api.routing import After, Limit, Route, answer, caller_of, core_of, gives, problems
from api.shapes import Delivery, DeliveryList, WebhookSecret
from jobs import outbox
from jobs.connections import redis_errors
from jobs.errors import NotFound

router = APIRouter(prefix="/v1", tags=["webhooks"], route_class=Route)


@router.get(
    "/webhook-deliveries",
    response_class=Response,
    summary="List webhooks",
    responses={200: gives("A page of webhooks, newest first.", "DeliveryList"), **problems(404)},
)
async def list_deliveries(
    request: Request,
    state: Annotated[Literal["pending", "delivered", "dead"] | None, Query(description="In this state only.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> Response:
    """Delivered ones for a day, those that were given up for a month. A page of one state may be short and still have others
    behind it: `has_more` says so."""
    core = core_of(request)
    try:
        with redis_errors():
            page = await outbox.events_of(core.client, caller_of(request).tenant, limit, after, state)
    except NotFound:
        raise not_found("webhook to go on behind") from None
    data = [
        Delivery(
            id=event.id,
            type=event.type,
            subject=event.subject,
            url=event.url,
            state=event.state,
            attempts=event.attempts,
            created_at=event.created_at,
            next_at=event.due_at,
            last_at=event.last_at,
            last_status=event.last_status,
            last_error=event.last_error,
        )
        for event in page.events
    ]
    return answer(DeliveryList(data=data, has_more=page.next is not None, after=page.next))


@router.post(
    "/webhook-deliveries/{delivery}/retry",
    status_code=204,
    response_class=Response,
    summary="Deliver a webhook again",
    responses={204: {"description": "It is tried at once, and for another day."}, **problems(404, 409)},
)
async def retry_delivery(request: Request, delivery: str) -> Response:
    """For one that was given up, or that waits for its next try."""
    core = core_of(request)
    try:
        with redis_errors():
            pending = await outbox.again(core.client, caller_of(request).tenant, delivery)
    except NotFound:
        raise not_found("webhook") from None
    if not pending:
        raise Problem(409, "delivered", "this webhook has been delivered")
    return Response(status_code=204)


@router.get(
    "/webhook-secret",
    response_class=Response,
    summary="The secret of webhooks",
    responses={200: gives("What this tenant's webhooks are signed with.", "WebhookSecret"), **problems()},
)
async def get_secret(request: Request) -> Response:
    """Of all tokens of this tenant; receivers check signatures with it. Who has it could sign: it takes both scopes."""
    core, caller = core_of(request), caller_of(request)
    caller.need("submit")
    with redis_errors():
        secret = await outbox.secret_of(core.client, caller.tenant)
    return answer(WebhookSecret(secret))
