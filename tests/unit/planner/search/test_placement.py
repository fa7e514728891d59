from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.latency.gpus import Gpu
from splitserve.planner.deployment import Link, Parallelism, Role
from splitserve.planner.machines import Machines, Node
from splitserve.planner.question import Costs, Question
from splitserve.planner.search.candidates import Candidate, Option
from splitserve.planner.search.placement import crossing, deployment, link_ceiling_rps, place
from tests.unit.planner.fixtures.questions import A100, FAST, H100, affine, asked

SLOW = Link(1e9)


def option(role: Role, tp: int = 1, pp: int = 1, kind: Gpu = A100) -> Option:
    costs = affine(kind, Parallelism(1, pp))
    assert isinstance(costs, Costs)
    return Option(role, kind, Parallelism(tp, pp), 2048, costs)


def on(nodes: tuple[Node, ...], between: Link = FAST) -> Question:
    return replace(asked(), machines=Machines(nodes, between))


def pair(prefills: int, decodes: int, tp: int = 1, kinds: tuple[Gpu, Gpu] = (A100, A100)) -> Candidate:
    first, second = option(Role.PREFILL, tp, kind=kinds[0]), option(Role.DECODE, tp, kind=kinds[1])
    return Candidate(((first, prefills), (second, decodes)))


@given(
    sizes=st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=4),
    tps=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4])),
    pps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    numbers=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_no_node_holds_more_than_it_has_and_every_stage_is_on_one(
    sizes: list[int], tps: tuple[int, int], pps: tuple[int, int], numbers: tuple[int, int]
) -> None:
    question = on(tuple(Node(A100, size) for size in sizes))
    options = (option(Role.PREFILL, tps[0], pps[0]), option(Role.DECODE, tps[1], pps[1]))
    candidate = Candidate(tuple(zip(options, numbers, strict=True)))
    placement = place(question, candidate, 1.0)
    if placement is None:
        return
    used = [0] * len(sizes)
    for pool in placement.pools:
        for nodes in pool.nodes:
            assert len(nodes) == pool.parallelism.pp
            for node in nodes:
                used[node] += pool.parallelism.tp
    assert all(have >= taken for have, taken in zip(sizes, used, strict=True))
    assert placement.gpus == sum(used) == candidate.gpus


def test_powers_of_two_leave_no_gaps() -> None:
    candidate = Candidate(((option(Role.PREFILL, 1), 3), (option(Role.DECODE, 4), 3), (option(Role.DECODE, 1), 1)))
    assert place(on((Node(A100, 8),) * 2), candidate, 1.0) is not None


def test_tensor_ranks_never_cross_nodes() -> None:
    assert place(on((Node(A100, 2),) * 4), Candidate(((option(Role.COLOCATED, 4), 1),)), 1.0) is None


def test_pipeline_stages_may_cross_nodes() -> None:
    placement = place(on((Node(A100, 2),) * 2), Candidate(((option(Role.COLOCATED, 2, 2), 1),)), 1.0)
    assert placement is not None
    assert set(placement.pools[0].nodes[0]) == {0, 1}


def test_fast_links_let_pools_sit_anywhere() -> None:
    placement = place(on((Node(A100, 4),) * 2), pair(4, 4), 1.0)
    assert placement is not None
    assert placement.affinity == "high"
    assert crossing(placement) == 1.0


def test_slow_links_put_both_pools_on_every_node() -> None:
    placement = place(on((Node(A100, 4),) * 2, SLOW), pair(4, 4), 2.0)
    assert placement is not None
    assert placement.affinity == "low"
    for pool in placement.pools:
        assert sorted(nodes[0] for nodes in pool.nodes) == [0, 0, 1, 1]
    assert crossing(placement) == 0.5


def test_pools_on_unequal_hardware_always_cross() -> None:
    placement = place(on((Node(H100, 4), Node(A100, 4))), pair(2, 3, kinds=(H100, A100)), 1.0)
    assert placement is not None
    assert crossing(placement) == 1.0
    assert (placement.cost_per_hour, placement.watts) == (2 * 4.0 + 3 * 2.0, 2 * H100.watts + 3 * A100.watts)


def test_a_link_serves_no_more_than_its_bytes() -> None:
    question = on((Node(H100, 4), Node(A100, 4)), SLOW)
    placement = place(question, pair(1, 1, kinds=(H100, A100)), 1.0)
    assert placement is not None
    kv_bytes = question.model.kv_bytes_per_token * question.workload.mean_prompt_tokens
    assert link_ceiling_rps(question, placement) == pytest.approx(1e9 / kv_bytes)


def test_nothing_crosses_within_a_node() -> None:
    question = on((Node(A100, 4),), SLOW)
    placement = place(question, pair(2, 2), 1.0)
    assert placement is not None
    assert (crossing(placement), link_ceiling_rps(question, placement)) == (0.0, float("inf"))


def test_permuted_nodes_are_filled_alike() -> None:
    nodes = (Node(A100, 4), Node(H100, 2), Node(A100, 2))
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        placement = place(on(tuple(nodes[n] for n in order)), pair(2, 2, tp=2, kinds=(A100, H100)), 1.0)
        found.append(placement and [sorted(order[n[0]] for n in pool.nodes) for pool in placement.pools])
    assert found[0] == found[1]


def test_the_deployment_has_the_placements_workers() -> None:
    question = on((Node(A100, 4),) * 2)
    candidate = pair(4, 3)
    placement = place(question, candidate, 1.0)
    assert placement is not None
    deployed = deployment(question, candidate, placement)
    assert [worker.role for worker in deployed.workers] == [Role.PREFILL] * 4 + [Role.DECODE] * 3
    assert [worker.node for worker in deployed.workers] == [n[0] for pool in placement.pools for n in pool.nodes]
    assert deployed.workers[0].kv_blocks == 60_000 // 16
    assert deployed.within.bytes_per_s == A100.link_bytes_per_s
    assert deployed.between == FAST
