"""What a request over HTTP may say: OpenAI's fields, each checked, and an error in OpenAI's form where one is wrong.

A field that would change the answer and that this server does not know is refused. Other servers pass over it, and the
caller takes an answer for one that the field has shaped.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr

from labkit.serving.sampling import Sampling

STOPS = 4  # stop words of a request, as OpenAI allows
LONGEST_STOP = 200  # letters
CHOICES = 16  # answers to one request, prompts times n


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong, and what is allowed.
        code: what programs tell cases apart by, such as "model_not_found".
        param: the field that is wrong, if it is one.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def as_json(self) -> dict[str, Any]:
        """The body of the answer, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def no_bool(value: Any) -> Any:
    """`value`, unless it is a bool, which Python would count as a number."""
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


def as_stops(value: Any) -> Any:
    """A stop word alone as a list of one, and none as an empty list."""
    return [value] if isinstance(value, str) else [] if value is None else value


Number = Annotated[float, BeforeValidator(no_bool)]
Stop = Annotated[StrictStr, Field(min_length=1, max_length=LONGEST_STOP)]


class StreamOptions(BaseModel):
    """`include_usage`: one more chunk at the end, with the tokens counted."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Asked(BaseModel):
    """What completions and chats have in common; `strength` is the factor of the adapter's correction."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: StrictStr
    n: StrictInt = Field(1, ge=1, le=CHOICES)
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: StrictInt = Field(0, ge=0)
    seed: StrictInt | None = Field(None, ge=0, lt=2**62)
    stop: Annotated[list[Stop], BeforeValidator(as_stops), Field(max_length=STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    strength: Number = Field(1.0, ge=-10, le=10)
    user: StrictStr | None = Field(None, max_length=256)
    presence_penalty: Literal[0, None] = None
    frequency_penalty: Literal[0, None] = None
    logprobs: Literal[False, None] = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def samplings(self, answers: int) -> list[Sampling]:
        """How each of so many answers is drawn: each with a seed of its own."""
        seed = secrets.randbits(61) if self.seed is None else self.seed
        return [Sampling(self.temperature, self.top_p, self.top_k, seed + i) for i in range(answers)]


class CompletionBody(Asked):
    """The body of `/v1/completions`."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    max_tokens: StrictInt | None = Field(16, ge=1)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more prompts, as texts or as token ids."""
        is_one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else self.prompt  # type: ignore[list-item, return-value]


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant", "developer"]
    content: StrictStr
    name: StrictStr | None = None


class ChatBody(Asked):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)


class LoadBody(BaseModel):
    """The body of `/v1/load_lora_adapter`."""

    model_config = ConfigDict(extra="forbid")
    lora_name: StrictStr
    lora_path: StrictStr = Field(min_length=1, max_length=4096)


class UnloadBody(BaseModel):
    """The body of `/v1/unload_lora_adapter`."""

    model_config = ConfigDict(extra="forbid")
    lora_name: StrictStr
    lora_int_id: int | None = None


def invalid(errors: list[Mapping[str, Any]]) -> Refused:
    """What is answered to a body that does not validate: the first fault, and where it is."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}", "invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"{where} is not supported by this server; leave it out"
        return Refused(400, message, "unsupported_parameter", where)
    message = f"{where}: {first['msg']}" if where else f"the body: {first['msg']}"
    return Refused(400, message, "invalid_value", where)
