"""What KV moves over, as queued resources.

A worker has a link of its own for each direction within its node (NVLink); between nodes all workers of a node share
its NIC. A transfer takes both ends' links for bytes / bandwidth, after whatever was given to them before. With
layer-wise push the first layer goes once it is computed and the last one can't go sooner, so a transfer ends no earlier
than `produced_to` + one layer's time.
"""

from splitserve.planner.deployment import Deployment, Link
from splitserve.planner.simulator.outcome import LinkUse


class Channel:
    """One direction of one link."""

    __slots__ = ("busy_s", "carried_bytes", "free_at", "link", "name")

    def __init__(self, name: str, link: Link) -> None:
        self.name = name
        self.link = link
        self.free_at = 0.0
        self.busy_s = 0.0
        self.carried_bytes = 0.0

    def use(self, simulated_s: float) -> LinkUse:
        return LinkUse(self.name, self.carried_bytes, self.busy_s / simulated_s if simulated_s else 0.0)


class Links:
    """All links of a deployment. Workers are numbered as there."""

    def __init__(self, deployment: Deployment) -> None:
        self._layers = max(1, deployment.layers)
        self._bytes_per_token = deployment.kv_bytes_per_token
        self._layerwise = deployment.layerwise
        workers = deployment.workers
        self._node = [worker.node for worker in workers]
        self._own_out = [Channel(f"worker {n} sends", deployment.within) for n in range(len(workers))]
        self._own_in = [Channel(f"worker {n} receives", deployment.within) for n in range(len(workers))]
        nodes = sorted(set(self._node))
        self._node_out = {node: Channel(f"node {node} sends", deployment.between) for node in nodes}
        self._node_in = {node: Channel(f"node {node} receives", deployment.between) for node in nodes}

    def push(self, source: int, destination: int, tokens: int, produced_from: float, produced_to: float) -> float:
        """The KV of so many tokens, computed in that time (seconds), goes from worker to worker. Returns when it has
        arrived; calls come in the order in which the computing began."""
        out, into = self._ends(source, destination)
        link = out.link
        carried = tokens * self._bytes_per_token
        took = carried / link.bytes_per_s
        first = produced_from + (produced_to - produced_from) / self._layers if self._layerwise else produced_to
        begin = max(first, out.free_at, into.free_at)
        for channel in (out, into):
            channel.free_at = begin + took
            channel.busy_s += took
            channel.carried_bytes += carried
        tail = took / self._layers if self._layerwise else took
        return max(begin + took, produced_to + tail) + link.latency_s

    def use(self, simulated_s: float) -> tuple[LinkUse, ...]:
        """Of the links that carried anything."""
        channels = [*self._node_out.values(), *self._node_in.values(), *self._own_out, *self._own_in]
        return tuple(channel.use(simulated_s) for channel in channels if channel.carried_bytes)

    def _ends(self, source: int, destination: int) -> tuple[Channel, Channel]:
        here, there = self._node[source], self._node[destination]
        if here == there:
            return self._own_out[source], self._own_in[destination]
        return self._node_out[here], self._node_in[there]
