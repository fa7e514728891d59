"""What a router does for its callers, whatever protocol they speak: the one door of gRPC, KServe and HTTP.

Names and admits each request, counts and logs how it ended. Its life is `journey`'s; on the wire it is the business of
the servicers (`service`, `kserve`) and of the gateway, whose `Backend` this is. Used on the router's event loop only.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import uuid4

from splitserve.core.deadline import Deadline
from splitserve.core.errors import Cancelled, DeadlineExceeded, EngineError, ModelNotFound, SplitserveError
from splitserve.core.request import Chat, Chunk, GenerateRequest, Model
from splitserve.core.sink import Sink
from splitserve.router import choices
from splitserve.router.access import AccessControl
from splitserve.router.journey import Journey, Surroundings, Terms
from splitserve.router.keys import Scope
from splitserve.router.running import Running
from splitserve.router.traffic import LiveTraffic
from splitserve.router.validate import lora_of
from splitserve.rpc.status import code_of
from splitserve.telemetry import traces
from splitserve.telemetry.logs import Logger, about
from splitserve.telemetry.metrics import RouterMetrics

_TOKENIZE_WITHIN_S = 60.0


class Endpoint:
    """`bearer` is the API key that came with a call, "" without one. Every method raises a SplitserveError."""

    def __init__(
        self,
        around: Surroundings,
        running: Running,
        access: AccessControl,
        logger: Logger,
        traffic: LiveTraffic | None = None,
    ) -> None:
        self._around = around
        self._access = access
        self._running = running
        self._logger = logger
        self._traffic = traffic
        self._created = int(time.time())

    async def generate(
        self, request: GenerateRequest, sink: Sink, bearer: str = "", time_left_s: float | None = None
    ) -> None:
        """Fills the sink; returns after the last chunk. `time_left_s` is what the caller allows, if that is less than
        the request's deadline."""
        request_id = request.request_id or uuid4().hex
        around = self._around
        with (
            about(request_id=request_id),
            around.tracer.request(request, request_id, request.model or around.model.name) as span,
            _recorded(around.metrics, self._logger, span),
        ):
            tenant = self._access.identify(bearer, Scope.INFERENCE)
            with self._access.admitted(tenant), self._running.admitted(request_id):
                salt = tenant.salted(request.cache_salt)
                last = await self._travel(
                    replace(request, request_id=request_id, cache_salt=salt),
                    sink,
                    Terms(
                        deadline=self._deadline(request, time_left_s),
                        charge=lambda tokens: self._access.charge(tenant, tokens),
                        span=span,
                    ),
                )
                span.note(traces.answered, last)
        self._note_finished(request_id, request.slo_class, last)

    async def _travel(self, request: GenerateRequest, sink: Sink, terms: Terms) -> Chunk:
        def sets_out(choice: int, journey: Journey) -> None:
            self._running.travels(request.request_id, choice, journey)

        return await choices.travel(request, sink, self._around, terms, sets_out)

    def _deadline(self, request: GenerateRequest, time_left_s: float | None) -> Deadline:
        allowed_s = (request.deadline_s or self._around.config.deadline_s, time_left_s)
        return Deadline.after(min(s for s in allowed_s if s is not None))

    async def tokenize(self, prompt: str | Chat, model: str = "", bearer: str = "") -> tuple[int, ...]:
        self._access.identify(bearer, Scope.INFERENCE)
        limits = self._around.limits
        lora_of(model, "", limits.model, limits.loras)
        try:
            async with asyncio.timeout(_TOKENIZE_WITHIN_S):
                return await self._around.text.token_ids(prompt, limits.prompt_tokens)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"not tokenised within {_TOKENIZE_WITHIN_S:g} s; try again, or shorten it"
            ) from error

    async def models(self, bearer: str = "") -> tuple[Model, ...]:
        """The model that is served, first; then its LoRA adapters."""
        self._access.identify(bearer, Scope.INFERENCE)
        limits = self._around.limits
        adapters = (Model(name, limits.max_tokens, limits.model, self._created) for name in limits.loras)
        return (Model(limits.model, limits.max_tokens, created=self._created), *adapters)

    async def model(self, name: str, bearer: str = "") -> Model:
        """Raises ModelNotFound."""
        models = await self.models(bearer)
        for model in models:
            if model.name == name:
                return model
        there = ", ".join(repr(model.name) for model in models)
        raise ModelNotFound(f"name: {name!r} is not served here; there are: {there}")

    async def can_serve(self) -> bool:
        """Whether some worker takes requests, and this router does."""
        return self._around.membership.can_serve and not self._running.draining

    def _note_finished(self, request_id: str, slo_class: str, last: Chunk) -> None:
        assert last.usage is not None
        if last.timings is None:  # it had its end when it came
            return
        self._around.metrics.finished(slo_class, last.usage, last.timings)
        if self._traffic is not None:
            self._traffic.add(last.usage)
        self._logger.info(
            "request finished",
            request_id=request_id,
            prompt_tokens=last.usage.prompt_tokens,
            output_tokens=last.usage.output_tokens,
            ttft_s=last.timings.ttft_s,
            tpot_s=last.timings.tpot_s,
            prefill_worker=last.timings.prefill_worker,
            decode_worker=last.timings.decode_worker,
            attempts=last.timings.attempts,
        )


@contextmanager
def _recorded(metrics: RouterMetrics, logger: Logger, span: traces.Span) -> Iterator[None]:
    """Counts, logs and traces how a request ended, and names what nobody foresaw."""
    code, sentence = "OK", ""
    try:
        yield
    except SplitserveError as error:
        code, sentence = code_of(error).name, str(error)
        logger.info("request failed", code=code, reason=sentence)
        raise
    except asyncio.CancelledError:
        code = code_of(Cancelled()).name
        logger.info("request cancelled")
        raise
    except Exception as error:
        code, sentence = code_of(EngineError()).name, type(error).__name__
        logger.exception("request broke the router", error)
        raise EngineError(
            f"the router failed on this request ({type(error).__name__}); its log has the cause"
        ) from error
    finally:
        metrics.ended(code)
        traces.end_request(span, code, sentence)
