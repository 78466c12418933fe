"""The store of responses as the key of one request may use it, with errors that a client understands."""

from __future__ import annotations

from fastapi import Request

from openbook.server.errors import ApiError
from openbook.server.response_store import ResponseStore, StoreError, Turn
from openbook.server.schema_chat import MAX_MESSAGES
from openbook.server.state import ServerState


class Keeper:
    """The store, as the key of one request may use it.

    Args:
        state: of the server.
        request: whose key it is.
    """

    def __init__(self, state: ServerState, request: Request) -> None:
        self._store = state.responses
        # The gate has found it to be a good one.
        key = request.headers.get("authorization", "").partition(" ")[2].strip()
        self._key = key if state.keys else None

    async def begin(self, wanted: bool | None) -> bool:
        """Whether a response is to be kept, and that it can be.

        Raises:
            ApiError: 400, it is and there is no store; 507, it cannot be.
        """
        if self._store is None:
            if wanted:
                raise ApiError(
                    400,
                    "store is true and nothing is stored here: leave it out, or start the server with --response-store",
                    param="store",
                    code="invalid_value",
                )
            return False
        if wanted is False:
            return False
        try:
            await self._store.check()
        except StoreError as error:
            raise _full(error) from error
        return True

    async def add(self, turn: Turn) -> None:
        """Keep a response.

        Raises:
            ApiError: 507, it cannot be kept.
        """
        assert self._store is not None
        try:
            await self._store.add(self._key, turn)
        except StoreError as error:
            raise _full(error) from error

    async def conversation(self, response_id: str | None) -> list[Turn]:
        """What a request goes on from, the first response first.

        Raises:
            ApiError: 400, there is no such response, or one before it was deleted; 503, the store cannot be read.
        """
        if response_id is None:
            return []
        try:
            turns = await self.find(response_id)
        except ApiError as error:
            if error.status_code == 404:
                raise _no_previous(error.detail, "previous_response_not_found") from error
            raise
        if turns[0].previous is not None:
            raise _no_previous(
                f"a response before {response_id} was deleted: send the conversation as input",
                "previous_response_deleted",
            )
        return turns

    async def find(self, response_id: str, most_turns: int = MAX_MESSAGES) -> list[Turn]:
        """A response and those before it, the first one first.

        Raises:
            ApiError: 404, there is none of that id that belongs to the key; 503, the store cannot be read.
        """
        try:
            turns = await self._store.conversation(self._key, response_id, most_turns) if self._store else []
        except StoreError as error:
            raise ApiError(
                503, f"stored responses cannot be read now: {error}; try again later", code="store_failed"
            ) from error
        if not turns:
            raise _unknown(response_id, self._store)
        return turns

    async def delete(self, response_id: str) -> None:
        """Forget a response.

        Raises:
            ApiError: 404, there is none of that id that belongs to the key; 507, nothing can be changed now.
        """
        try:
            is_there = await self._store.delete(self._key, response_id) if self._store else False
        except StoreError as error:
            raise ApiError(
                507, f"the response cannot be deleted now: {error}; try again later", code="store_failed"
            ) from error
        if not is_there:
            raise _unknown(response_id, self._store)


def _full(error: StoreError) -> ApiError:
    return ApiError(
        507,
        f"the response cannot be stored: {error}; send store: false, or ask whoever runs the server",
        param="store",
        code="store_failed",
    )


def _unknown(response_id: str, store: ResponseStore | None) -> ApiError:
    why = "it was not stored, is deleted or too old, or is another key's" if store else "nothing is stored here"
    return ApiError(
        404, f"there is no response {response_id[:80]!r}: {why}", param="response_id", code="response_not_found"
    )


def _no_previous(message: str, code: str) -> ApiError:
    return ApiError(400, message, param="previous_response_id", code=code)
