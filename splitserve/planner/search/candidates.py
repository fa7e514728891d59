"""What a search chooses among: workers that can be built (`Option`) and how many of each (`Candidate`). Values, and the
rules that enumerate them. What they would serve is for `queueing` and `phases` to say."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from splitserve.core.errors import ConfigError
from splitserve.latency.gpus import Gpu
from splitserve.planner.deployment import Parallelism, Role
from splitserve.planner.machines import Machines
from splitserve.planner.question import Costs, Objective, Question

_DEGREES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of pipelines; tensor degrees are powers of two, and three
_TENSOR_DEGREES = (1, 2, 3, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """A worker that can be built. Compared by identity: one search makes each once."""

    role: Role
    gpu: Gpu
    parallelism: Parallelism
    chunk_tokens: int
    costs: Costs

    @property
    def gpus(self) -> int:
        return self.parallelism.gpus

    @property
    def name(self) -> tuple[str, str, int, int, int]:
        """Sorts options, whatever order machines were given in."""
        return (str(self.role), self.gpu.name, self.parallelism.tp, self.parallelism.pp, self.chunk_tokens)


@dataclass(frozen=True, slots=True)
class Unfit:
    """A worker that can't be built, and why."""

    role: Role
    gpu: Gpu
    parallelism: Parallelism
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """So many workers of each option: one prefill and one decode pool, or one colocated pool."""

    pools: tuple[tuple[Option, int], ...]

    @property
    def gpus(self) -> int:
        return sum(option.gpus * workers for option, workers in self.pools)

    @property
    def colocated(self) -> bool:
        return self.pools[0][0].role is Role.COLOCATED

    @property
    def name(self) -> tuple[object, ...]:
        return tuple((*option.name, workers) for option, workers in self.pools)


def options(question: Question) -> tuple[list[Option], list[Unfit]]:
    """Every worker that the machines could hold, and those that they couldn't with the reason."""
    fit: list[Option] = []
    unfit: list[Unfit] = []
    for gpu in sorted(question.machines.kinds, key=lambda gpu: gpu.name):
        for parallelism in parallelisms(question.machines, gpu):
            costs = question.costs(gpu, parallelism)
            reason = costs if isinstance(costs, str) else _too_small(costs, question)
            if isinstance(costs, str) or reason:
                unfit += [Unfit(role, gpu, parallelism, reason) for role in Role]
            else:
                fit += [Option(role, gpu, parallelism, chunk, costs) for role, chunk in _roles(question)]
    return fit, unfit


def parallelisms(machines: Machines, gpu: Gpu) -> Iterator[Parallelism]:
    """Tensor ranks of one stage share a node; stages may sit on different ones."""
    sizes = [node.gpus for node in machines.nodes if node.gpu == gpu]
    for tp in _TENSOR_DEGREES:
        stages = sum(size // tp for size in sizes)
        yield from (Parallelism(tp, pp) for pp in _DEGREES if pp <= stages)


def counts(pools: tuple[Option, ...], machines: Machines) -> Iterator[tuple[int, ...]]:
    """How many of each the GPUs suffice for, at least one of each."""
    for n, most in room(pools, machines):
        yield from ((n, m) for m in range(1, most + 1)) if len(pools) > 1 else ((n,),)


def room(pools: tuple[Option, ...], machines: Machines) -> Iterator[tuple[int, int]]:
    """For each number of the first pool's workers, how many of the last's fit beside them; itself if it is the same."""
    budget = {gpu: sum(node.gpus for node in machines.nodes if node.gpu == gpu) for gpu in machines.kinds}
    first, second = pools[0], pools[-1]
    for n in range(1, budget[first.gpu] // first.gpus + 1):
        left = budget[second.gpu] - (n * first.gpus if first.gpu == second.gpu else 0)
        yield n, n if len(pools) == 1 else left // second.gpus


def pairings(fit: Iterable[Option]) -> Iterator[tuple[Option, ...]]:
    """Pools that serve together."""
    by_role: dict[Role, list[Option]] = {role: [] for role in Role}
    for option in fit:
        by_role[option.role].append(option)
    yield from ((prefill, decode) for prefill in by_role[Role.PREFILL] for decode in by_role[Role.DECODE])
    yield from ((colocated,) for colocated in by_role[Role.COLOCATED])


@dataclass(frozen=True, slots=True)
class Aim:
    """What makes one candidate better than another. With `fastest` it is the rate alone, whatever the question's
    objective: for finding out what could be served at all."""

    question: Question
    fastest: bool = False

    def value(self, candidate: Candidate, rate_rps: float) -> float:
        """Of serving this rate, more being better; 0 where it is less than what must be served."""
        if rate_rps <= 0.0 or rate_rps < (self.question.rate_rps or 0.0):
            return 0.0
        if self.fastest:
            return rate_rps
        served = 1.0 if self.question.objective is Objective.FEWEST else rate_rps
        return served / sum(self.weight(option) * workers for option, workers in candidate.pools)

    def most(self, pools: tuple[Option, ...], rates_rps: Sequence[float]) -> float:
        """The highest value that any number of workers can have, each serving at most its rate: the pools' numbers
        match when they are as one to the other's rate."""
        asked = self.question.rate_rps or 0.0
        if self.fastest or asked:
            fitting = room(pools, self.question.machines)
            reached = max((min(n * rates_rps[0], m * rates_rps[-1]) for n, m in fitting), default=0.0)
            if self.fastest or reached < asked:
                return reached if reached >= asked else 0.0
        weighed = [(self.weight(option), rate) for option, rate in zip(pools, rates_rps, strict=True)]
        if self.question.objective is Objective.FEWEST:
            return 1.0 / sum(weight * ceil(asked / rate) for weight, rate in weighed)
        return 1.0 / sum(weight / rate for weight, rate in weighed)

    def weight(self, option: Option) -> float:
        """What the objective divides by, of one worker: GPUs, their price per hour or their watts. Raises ConfigError
        for a GPU without a price where the objective is cost."""
        gpu, objective = option.gpu, self.question.objective
        prices = {kind.price_per_hour for kind in self.question.machines.kinds}
        if objective is Objective.PER_COST and gpu.price_per_hour is None:
            raise ConfigError("objective", f"{objective} needs a price per hour for {gpu.name}, which has none")
        if objective is Objective.PER_COST or (
            objective is Objective.FEWEST and len(prices) > 1 and None not in prices
        ):
            return float(gpu.price_per_hour or 0.0) * option.gpus
        return (gpu.watts if objective is Objective.PER_WATT else 1.0) * option.gpus


def _roles(question: Question) -> Iterator[tuple[Role, int]]:
    yield from ((role, question.prefill_chunk) for role in (Role.PREFILL, Role.DECODE))
    yield from ((Role.COLOCATED, chunk) for chunk in question.chunks)


def _too_small(costs: Costs, question: Question) -> str:
    """An engine refuses to start if its cache can't hold one request of the longest kind."""
    if costs.kv_tokens >= question.max_model_len:
        return ""
    return (
        f"beside the weights there is room for the KV cache of {max(costs.kv_tokens, 0):,} tokens, fewer than the "
        f"longest request's {question.max_model_len:,}"
    )
