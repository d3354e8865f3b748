"""What the benchmarks' peers are fed: layouts of other libraries, and the sums they are judged by."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_peers
import peer_flashmla
import peer_library
import peer_marlin

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.kv_entry import unpack


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (peer_library, peer_marlin, peer_flashmla):
        monkeypatch.setattr(module, "CUDA", torch.device("cpu"))
    peer_marlin.tile_order.cache_clear()
    peer_flashmla.pool.cache_clear()


def test_reference_matrix_is_what_the_engine_reads_from_the_same_codes() -> None:
    packed, scale = peer_library.codes(3, 128, 256)
    ours = Weight("w", "nvfp4", packed, scale, peer_library.GLOBAL).dequantize()
    assert torch.equal(ours, peer_library.dequantised(3, 128, 256))


def test_marlin_words_hold_the_codes_of_an_mma_fragment() -> None:
    """Thread t of warp w keeps rows 2 (t % 4) + {0, 1, 8, 9} of columns t / 4 and 8 further on."""
    n, k = 128, 48
    packed, _ = peer_library.codes(1, n, k)
    code = [[int(packed[c, r // 2]) >> 4 * (r % 2) & 15 for c in range(n)] for r in range(k)]
    words = peer_marlin.packed_layout(packed).view(k // 16, n // 64, 32, 4)
    for tile_k, tile_n, thread, warp in ((0, 0, 0, 0), (2, 1, 31, 3), (1, 0, 13, 2), (1, 1, 6, 1)):
        row, column = 16 * tile_k + thread % 4 * 2, 64 * tile_n + 16 * warp + thread // 4
        near = [code[row + r][column] for r in (0, 1, 8, 9)]
        far = [code[row + r][column + 8] for r in (0, 1, 8, 9)]
        order = [near[0], near[2], far[0], far[2], near[1], near[3], far[1], far[3]]
        want = sum(v << 4 * i for i, v in enumerate(order))
        assert int(words[tile_k, tile_n, thread, warp]) & 0xFFFFFFFF == want


def test_pairs_are_padded_by_expert() -> None:
    chosen = torch.tensor([[5, 1], [1, 3], [1, 5], [1, 0]])
    pairs, owners, total = peer_library.aligned(chosen, 8, 2)
    assert owners.tolist() == [0, 1, 1, 3, 5]
    assert pairs.tolist() == [7, 8, 1, 2, 4, 6, 3, 8, 0, 5] and total == 10


def test_rows_read_from_pages_are_the_engines_entries() -> None:
    pages = peer_flashmla.pool(3)
    index = torch.tensor([0, 63, 64, 191])
    data = pages[:, : 64 * 576].reshape(-1, 576)[index]
    scales = pages[:, 64 * 576 : 64 * 584].reshape(-1, 8)[index]
    entries = torch.cat((data, scales), 1)
    assert torch.equal(peer_flashmla.rows_of(pages, index), unpack(entries, 512).float())


def test_wrong_or_nan_results_do_not_count() -> None:
    want = torch.ones(4, 4)
    assert peer_library.error(want + 0.001, want, 0.01) == pytest.approx(0.001, rel=0.01)
    for got in (want + 0.1, want * torch.nan):
        with pytest.raises(ArithmeticError, match="relative error"):
            peer_library.error(got, want, 0.01)


def test_peers_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DSV4_PEERS", raising=False)
    monkeypatch.setattr(bench_peers.peer_humming, "installed", lambda: False)
    left_out = bench_peers.attach([])
    assert set(left_out) == {label for _, label, _, _ in bench_peers.BUILT}
    assert left_out["FlashMLA"] == "DSV4_PEERS is not set"
    assert "not installed" in left_out["Humming"]
    monkeypatch.setenv("DSV4_PEERS", str(tmp_path))
    assert bench_peers.attach([])["Marlin"] == f"no {tmp_path / 'marlin.so'}"


def test_only_peers_of_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV4_PEERS", raising=False)
    assert set(bench_peers.attach([], "[!H]*")) == {
        label for _, label, _, _ in bench_peers.BUILT if not label.startswith("Humming")
    }
