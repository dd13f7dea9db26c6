"""The routes of rollouts: what users say of answers, and how the trials stand.

POST /v1/feedback      {"id": "cmpl-…", "score": 1}, once for each answer: 0 is wrong, 1 is right
GET /v1/rollouts       every trial, with the numbers that decide it
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from labkit.files.writing import CannotWrite
from labkit.serving.protocol import Number, Refused
from labkit.serving.rollout import Rollouts
from labkit.serving.routed import AlreadyScored, UnknownAnswer


class FeedbackBody(BaseModel):
    """The body of `/v1/feedback`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    id: StrictStr = Field(min_length=1, max_length=200)
    score: Number = Field(ge=0, le=1, strict=True)


def add_feedback(app: FastAPI, rollouts: Rollouts | None) -> None:
    """Add the routes; without rollouts they are 404."""

    @app.post("/v1/feedback")
    def feedback(body: FeedbackBody) -> dict[str, Any]:
        return {"object": "feedback", "id": body.id, "counted": taken_in(there(rollouts), body)}

    @app.get("/v1/rollouts")
    def trials() -> dict[str, Any]:
        return there(rollouts).as_json()


def there(rollouts: Rollouts | None) -> Rollouts:
    if rollouts is None:
        raise Refused(404, "this server has no registry, and so no trials", "no_rollouts")
    return rollouts


def taken_in(rollouts: Rollouts, body: FeedbackBody) -> bool:
    """Does the score count? Each reason why it is not taken has its status."""
    try:
        return rollouts.feedback(body.id, body.score)
    except UnknownAnswer as error:
        raise Refused(404, str(error), "answer_not_found", "id") from None
    except AlreadyScored as error:
        raise Refused(409, str(error), "already_scored", "id") from None
    except CannotWrite:
        raise Refused(503, "the score could not be recorded; try again later", "unavailable") from None
