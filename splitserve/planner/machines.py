"""The GPUs that a plan may use: nodes of one kind of GPU each, and what joins them."""

from dataclasses import dataclass
from itertools import groupby

from splitserve.latency.gpus import Gpu
from splitserve.planner.deployment import Link


@dataclass(frozen=True, slots=True)
class Node:
    gpu: Gpu
    gpus: int


@dataclass(frozen=True, slots=True)
class Machines:
    """`between` joins any two nodes; within a node GPUs are joined by their own `Gpu.link_bytes_per_s`."""

    nodes: tuple[Node, ...]
    between: Link

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    @property
    def kinds(self) -> tuple[Gpu, ...]:
        """Each kind of GPU once, in the order given."""
        return tuple(dict.fromkeys(node.gpu for node in self.nodes))

    def __str__(self) -> str:
        groups = [(node, len(list(same))) for node, same in groupby(self.nodes)]
        return ", ".join(f"{node.gpu.name}:{count}x{node.gpus}" for node, count in groups)
