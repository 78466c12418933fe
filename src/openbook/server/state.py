"""What the parts of one server share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request

from openbook.server.auth import KeyRing
from openbook.server.limits import Account
from openbook.server.metrics import Metrics
from openbook.server.response_store import ResponseStore
from openbook.server.served_model import ServedModel, ServedModels
from openbook.server.settings import ServerSettings

_DAY_S = 86_400


class ServerState:
    """The models of a server, and what it keeps while it runs.

    Raises:
        UserError: no model, two of one name, or a key that is none.
    """

    def __init__(self, models: Sequence[ServedModel], settings: ServerSettings) -> None:
        self.models, self.settings, self.metrics = ServedModels(models), settings, Metrics()
        self.is_draining = False
        self.responses: ResponseStore | None = None
        if settings.response_store is not None:
            self.responses = ResponseStore(
                settings.response_store, settings.response_store_bytes, settings.response_store_days * _DAY_S
            )
        self.keys = KeyRing(settings.api_keys)
        limits = settings.requests_per_minute, settings.tokens_per_minute
        self.accounts = [Account(*limits) for _ in range(len(self.keys))]

    async def drain(self, deadline_s: float) -> None:
        """Take no more requests; let running answers finish, and end those that are not done after so many seconds."""
        self.is_draining = True
        await asyncio.gather(*(model.engine.close(deadline_s) for model in self.models))


def get_state(request: Request) -> ServerState:
    """The state of the application that a request came to."""
    state = request.app.state.openbook
    assert isinstance(state, ServerState)
    return state


def get_account(request: Request) -> Account | None:
    """What the request's key has used; None where no key is asked for."""
    account = request.scope.get("state", {}).get("account")
    assert account is None or isinstance(account, Account)
    return account


State = Annotated[ServerState, Depends(get_state)]
Payer = Annotated[Account | None, Depends(get_account)]
