"""The routes that one running request has had, and why: `splitserve status --explain`, and a debug line each.

Plain state of one journey, gone with it; seconds on the router's clock. It decides nothing.
"""

from dataclasses import dataclass
from math import isfinite

from splitserve.core.fleet import Decision
from splitserve.router.waiting import Binding
from splitserve.telemetry.logs import Logger

KEPT = 16  # routes: a request that moves often is not to grow


@dataclass(slots=True)
class _Route:
    """`waited_s` before it was bound; `left_s` from then until its first token was due, infinite if never."""

    binding: Binding
    waited_s: float
    left_s: float
    moved: bool
    first_token_at: float | None = None
    ended: str = ""


class Decisions:
    __slots__ = ("_routes",)

    def __init__(self) -> None:
        self._routes: list[_Route] = []

    def bound(self, binding: Binding, asked_at: float, due: float, moved: bool, logger: Logger) -> None:
        """A route was found for who asked then; its first token is due by `due`."""
        del self._routes[: 1 - KEPT]
        route = _Route(binding, binding.bound_at - asked_at, due - binding.bound_at, moved)
        self._routes.append(route)
        if binding.is_predicted and logger.debugs:
            _log(route, logger)

    def begins(self, now: float) -> None:
        """The first token by this route."""
        self._routes[-1].first_token_at = now

    def ended(self, how: str) -> None:
        self._routes[-1].ended = how

    def told(self, now: float) -> tuple[Decision, ...]:
        return tuple(_told(route, now) for route in self._routes)


def _log(route: _Route, logger: Logger) -> None:
    binding = route.binding
    slack = {"slack_s": route.left_s} if isfinite(route.left_s) else {}
    logger.debug(
        "route",
        decode=binding.decode.name,
        prefill=binding.prefill.name if binding.prefill is not None else "",
        waited_s=route.waited_s,
        read_s=binding.read_s,
        ttft_s=binding.ttft_s,
        waiting=binding.behind,
        **slack,
    )


def _told(route: _Route, now: float) -> Decision:
    binding, first_token_at = route.binding, route.first_token_at
    return Decision(
        decode_worker=binding.decode.name,
        prefill_worker=binding.prefill.name if binding.prefill is not None else "",
        moved=route.moved,
        predicted=binding.is_predicted,
        waited_s=route.waited_s,
        behind=binding.behind,
        left_s=route.left_s,
        read_s=binding.read_s,
        ttft_s=binding.ttft_s,
        first_token_s=first_token_at - binding.bound_at if first_token_at is not None else -1.0,
        since_s=now - binding.bound_at,
        ended=route.ended,
    )
