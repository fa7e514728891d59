"""What happened to each request and when: one list per moment, one row per request.

Lists and not arrays while the simulation runs: an element of a list is read ten times as fast. `outcome` makes arrays.
"""

from splitserve.workload.requests import Requests

NEVER = float("inf")
SKIPPED = float("nan")


class Journal:
    """Times are seconds. The first five columns are the workload's, the rest is written by whom it concerns; a later
    turn's arrival is when it really came."""

    __slots__ = (
        "arrival",
        "bound",
        "cached",
        "decode_worker",
        "due",
        "first_token",
        "kv_ready",
        "last_token",
        "next_turn",
        "output",
        "pause",
        "prefill_end",
        "prefill_start",
        "prefill_worker",
        "prompt",
    )

    def __init__(self, requests: Requests) -> None:
        count = len(requests)
        self.arrival: list[float] = requests.arrival_s.tolist()
        self.prompt: list[int] = requests.prompt_tokens.tolist()
        self.output: list[int] = requests.output_tokens.tolist()
        self.next_turn: list[int] = requests.next_turn.tolist()
        self.pause: list[float] = [0.0] * count if requests.pause_s is None else requests.pause_s.tolist()
        self.bound = [NEVER] * count
        self.due = [NEVER] * count
        self.prefill_start = [SKIPPED] * count
        self.prefill_end = [SKIPPED] * count
        self.kv_ready = [SKIPPED] * count
        self.first_token = [NEVER] * count
        self.last_token = [NEVER] * count
        self.cached = [0] * count
        self.prefill_worker = [-1] * count
        self.decode_worker = [-1] * count
