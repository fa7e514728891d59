"""What differs between vLLM's releases, 0.25 to 0.33, for a KV connector. The rest of the package need not know.

It looks for features, not for version numbers. Its state belongs to vLLM's step thread. Since which release:

    0.26  vLLM's own pull connector can read the CPU's KV blocks
    0.29  the KV layout with heads outside tokens is called LBHNC (before: HND)
    0.30  `get_transfer_results`, which can say that a load failed (before: `get_finished`, which can't);
          the scheduler's output can be asked for the block table of every request in the step
    0.31  `wait_for_save` is called in steps that run no model, too
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from splitserve.core.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

NO_PULL = "the pull connector of this vLLM can't read"
BlockIds = Sequence[Sequence[int]]  # per KV group


def heads_first_layout() -> str:
    """Heads outside tokens: one block of one head of one layer is one run of bytes."""
    return "LBHNC" if find_spec("vllm.v1.kv_cache_layout") else "HND"


def refuse_broken_pull() -> None:
    """Raises ConfigError where vLLM's own pull connector takes keys and values for separate, and they are not."""
    from vllm.distributed.kv_transfer.kv_connector.utils import TransferTopology
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and hasattr(TransferTopology, "split_k_and_v"):
        raise ConfigError("kv_transfer.mode", f"{NO_PULL} the KV blocks of a CPU; set it to push, or install vLLM 0.26")


@dataclass(frozen=True, slots=True)
class TransferResults:
    """Request ids, by vLLM's names for them (`KVConnectorTransferResults` where it exists, which vLLM only reads). A
    failed load is in `finished_recving` as well."""

    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


class CompletionHooks:
    """Mixed into a connector, in front of vLLM's class: its completions under the name that vLLM calls.

    `_completions` is called once in every step, whether a model ran or not: what every step needs belongs there, and
    not in `wait_for_save`.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._failures = _FailuresUntold()

    def _completions(self) -> TransferResults:
        raise NotImplementedError

    def _loading(self) -> Collection[str]:
        """Requests whose KV is still on its way, after `_completions`."""
        raise NotImplementedError

    def get_transfer_results(self, finished_req_ids: set[str]) -> TransferResults:
        return self._completions()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        results = self._completions()
        return results.finished_sending, self._failures.withheld(results, finished_req_ids, self._loading())


class _FailuresUntold:
    """Failed loads of a vLLM that would take them for complete. Such a request stays parked, as if its KV were on its
    way, until it has ended: the adapter hears of the failure from the transfer service, and aborts it."""

    def __init__(self) -> None:
        self._failed: set[str] = set()
        self._ended: set[str] = set()  # may fail yet: its end was on its way to the service

    def withheld(self, results: TransferResults, ended: set[str], loading: Collection[str]) -> set[str]:
        """Of what finished receiving, that which vLLM may hear of; failures once they have ended."""
        self._failed |= results.failed_recving
        self._ended |= ended
        over = self._failed & self._ended
        self._failed -= over
        self._ended &= self._failed.union(loading)
        return (results.finished_recving - results.failed_recving) | over


class BlockTables:
    """The block tables of vLLM's requests, on the scheduler's side."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[list[int], ...]] = {}

    def follow(self, output: "SchedulerOutput") -> None:
        """Called for every step, before `of`."""
        state: Any = getattr(output, "kv_connector_block_state", None)
        if hasattr(state, "get_block_ids"):
            self._look_up = state.get_block_ids
            return
        self._look_up = self._known.__getitem__
        self._gather(output)

    def of(self, request_id: str) -> BlockIds:
        """Of a request in the step: its blocks in each KV group, those of tokens before the step included."""
        table: BlockIds = self._look_up(request_id)
        return tuple(tuple(ids) for ids in table)

    def _gather(self, output: "SchedulerOutput") -> None:
        for request_id in output.finished_req_ids:
            self._known.pop(request_id, None)
        for request in output.scheduled_new_reqs:
            self._known[request.req_id] = tuple(list(ids) for ids in request.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self._known[request_id] = tuple(list(ids) for ids in new)
            elif new:
                for known, ids in zip(self._known[request_id], new, strict=True):
                    known.extend(ids)
