"""What the gateway needs of whoever serves requests: a router in this process, or one that a client talks to."""

from typing import Protocol

from splitserve.core.fleet import FleetStatus, RunningRequests
from splitserve.core.request import Chat, GenerateRequest, Model
from splitserve.core.sink import Sink


class Backend(Protocol):
    """`bearer` is the API key that came with the call, "" without one. Every method raises a SplitserveError."""

    async def generate(self, request: GenerateRequest, sink: Sink, bearer: str = "") -> None:
        """Fills the sink; returns after the last chunk. Cancelling it cancels the request."""

    async def tokenize(self, prompt: str | Chat, model: str = "", bearer: str = "") -> tuple[int, ...]: ...

    async def models(self, bearer: str = "") -> tuple[Model, ...]:
        """The model that is served, first; then its LoRA adapters."""

    async def can_serve(self) -> bool:
        """Whether some worker takes requests."""


class Oversight(Protocol):
    """What the console needs of one router, in this process or elsewhere: a client has it too. `bearer` is the
    operator's key. Every method raises a SplitserveError."""

    async def fleet(self, bearer: str = "") -> FleetStatus: ...

    async def requests(self, most: int = 0, bearer: str = "") -> RunningRequests:
        """The newest of those that wait or run."""


class Vocabulary(Protocol):
    """What each token is written as; log probabilities need it, nothing else does."""

    def text_of(self, token_id: int) -> str: ...
