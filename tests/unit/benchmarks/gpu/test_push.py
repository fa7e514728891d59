"""What the GPU benchmark counts, and that its comparison of bytes can fail."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("nixl")

from benchmarks.gpu.push.__main__ import refusal  # noqa: E402
from benchmarks.gpu.push.figures import Times, row_of, table  # noqa: E402
from benchmarks.gpu.push.measure import tables  # noqa: E402
from benchmarks.gpu.push.paced_prefill import LLAMA_8B, SMALL, Prefill, content, differing_bytes  # noqa: E402

LLAMA_8B_LAYER_WEIGHTS = 218_103_808  # without norms: 2 x 4096 x 4096 + 2 x 4096 x 1024 + 3 x 4096 x 14336


def test_llama_8bs_kv_is_128_kib_a_token() -> None:
    assert LLAMA_8B.block_bytes == 64 * 1024
    assert LLAMA_8B.kv_bytes(8192) == 1024**3


def test_a_layers_flop_are_two_per_weight_and_token_and_causal_attention() -> None:
    attention = 2 * 512 * 512 * 4096
    assert LLAMA_8B.layer_flop(512) == 2 * 512 * LLAMA_8B_LAYER_WEIGHTS + attention


def test_every_element_of_the_content_tells_where_it_belongs() -> None:
    one, other = (content(SMALL, layer, 3, "cpu") for layer in (0, 1))
    assert differing_bytes(one, one.clone()) == 0
    assert len({tuple(block.tolist()) for block in (*one, *other)}) == 6
    wrong = one.clone()
    wrong[2, 5] ^= 1
    assert differing_bytes(one, wrong) == 1
    assert differing_bytes(one, one.flip(0)) > one.numel()


def test_a_prefill_leaves_its_kv_in_the_blocks_of_its_table_and_nowhere_else() -> None:
    cache = torch.zeros((SMALL.layers, 6, SMALL.block_elements), dtype=torch.int16)
    prefill = Prefill(SMALL, 3 * SMALL.block_size, cache, [4, 0, 2])
    prefill.start().join(60.0)
    assert [layer for layer, _ in prefill.computed] == list(range(SMALL.layers))
    assert all(computed() for _, computed in prefill.computed)
    for layer in range(SMALL.layers):
        assert torch.equal(cache[layer, [4, 0, 2]], content(SMALL, layer, 3, "cpu"))
    assert not cache[:, [1, 3, 5]].any()


def test_shuffled_tables_use_each_block_once_and_are_the_same_in_every_run() -> None:
    here, there = tables(64, 32, shuffled=True)
    assert len(set(here)) == len(set(there)) == 32
    assert max(*here, *there) < 64
    assert here != there
    assert tables(64, 32, shuffled=True) == (here, there)
    assert tables(64, 4, shuffled=False) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_a_row_takes_medians_and_the_worst_uncovered_time() -> None:
    times = Times(
        push=[1.0, 0.5, 2.0], copy=[0.25], alone=[0.1], pushing=[0.2], uncovered=[0.001, 0.003, 0.002], writes=7
    )
    row = row_of(LLAMA_8B, 8192, times)
    assert row.push_gbps == pytest.approx(1.073741824)
    assert row.copy_gbps == pytest.approx(4 * 1.073741824)
    assert row.uncovered_ms == pytest.approx(2.0)
    assert row.uncovered_ms_worst == pytest.approx(3.0)
    assert row.prefill_tflops == pytest.approx(LLAMA_8B.layer_flop(8192) * 32 / 0.1 / 1e12)
    lines = table([row]).splitlines()
    assert len(lines) == 2
    assert len(lines[0]) == len(lines[1])


@pytest.mark.parametrize(
    ("device", "has_cuda", "tokens", "says"),
    [
        ("cuda", False, [512], "no CUDA device here; --device cpu"),
        ("cuda", True, [500], "multiples of 16"),
        ("cpu", False, [0], "multiples of 16"),
        ("cpu", False, [512], ""),
        ("cuda", True, [512, 8192], ""),
    ],
)
def test_what_can_not_be_run_is_refused_with_the_way_out(
    device: str, has_cuda: bool, tokens: list[int], says: str
) -> None:
    why = refusal(device, has_cuda, tokens, 16)
    assert says in why
    assert bool(why) == bool(says)
