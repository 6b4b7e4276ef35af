"""A peer's own programs: every mask and score mod of meta-pytorch/attention-gym, unmodified, against eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_gym import masks as gm
from attn_gym import mods as gs
from attn_gym.masks.document_mask import length_to_offsets
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

import saccade
from dense import classified

B, H, N, D = 2, 4, 64, 16
Case = tuple[str, Callable[..., Tensor] | None, Callable[..., Tensor] | None, int, int]


def cases() -> Iterator[Case]:
    """Name, score mod, mask mod, queries and keys of each program, with small settings."""
    torch.manual_seed(0)
    offsets = length_to_offsets([10, 30, 24], "cpu")

    def mask(name: str, mod: Any, n: int = N, m: int = N) -> Case:
        return name, None, mod, n, m

    def score(name: str, mod: Any, n: int = N) -> Case:
        return name, mod, None, n, n

    yield mask("causal", gm.causal_mask)
    yield mask("sliding window", gm.generate_sliding_window(9))
    yield mask("dilated sliding window", gm.generate_dilated_sliding_window(12, 3))
    yield mask("global sliding window", gm.generate_global_sliding_window(6, torch.arange(N) % 17 == 0))
    yield mask("prefix LM", gm.generate_prefix_lm_mask(11))
    yield mask("documents", gm.generate_doc_mask_mod(gm.causal_mask, offsets))
    yield mask("packed causal documents", gm.generate_packed_causal_doc_mask_mod(offsets))
    yield mask("batchify", gm.batchify_mask_mod(gm.causal_mask, 16))
    yield mask("shared prefix", gm.generate_shared_prefix_mask_mod(offsets, torch.tensor([0, 0, 0])))
    yield mask("block diffusion", gm.generate_block_diffusion_mask(N // 2, 8))
    yield mask("natten", gm.generate_natten(8, 8, 3, 5))
    yield mask("tiled natten", gm.generate_tiled_natten(8, 8, 3, 3, 4, 4))
    yield mask("morton natten", gm.generate_morton_natten(8, 8, 3, 3))
    yield mask("sliding tile 2d", gm.generate_sta_mask_mod_2d((8, 8), (4, 4), (2, 2)))
    yield mask("sliding tile 3d", gm.generate_sta_mask_mod_3d((4, 4, 4), (2, 2, 2), (2, 2, 2)))
    yield mask("SVG spatial head", gm.generate_spatial_head_mask_mod(16, 3, 16, 2, round_width=16))
    yield mask("SVG temporal head", gm.generate_temporal_head_mask_mod(16, 3, 16, 2))
    images = torch.tensor([[0, 20], [10, 40], [40, 64]], dtype=torch.int32)
    yield mask("flamingo cross-attention", gm.generate_vision_cross_attention_mask_mod(images, 16), N, 48)
    tree = gm.build_tree_ancestor_matrix([-1, 0, 0, 1, 1, 2, 2, 5], device="cpu")
    yield mask("jetspec tree", gm.generate_jetspec_tree_causal_mask_mod(24, tree), 8, 32)
    yield mask("jetspec training", gm.generate_jetspec_training_mask_mod(16, 8), 32, 48)
    yield mask("video sparse attention", gm.generate_vsa_mask_mod(torch.rand(B, H, 8, 8).topk(3, -1).indices, 8))
    yield score("alibi", gs.generate_alibi_bias(H))
    yield score("tanh soft cap", gs.generate_tanh_softcap(5))
    yield score("tanh soft cap, approximate", gs.generate_tanh_softcap(5, approx=True))
    yield score("sandwich", gs.generate_sandwich_bias(H, N))
    yield score("activation", gs.generate_activation_score_mod())
    yield score("MLA rope", gs.generate_mla_rope_score_mod(torch.randn(B, H, N, 8), torch.randn(B, 1, N, 8), H))
    graph = torch.rand(B, N, N) > 0.9
    graph = graph | graph.mT
    far = gs.shortest_path_distances(graph, 5)
    yield score("graphormer spatial", gs.generate_graphormer_spatial_bias(torch.randn(H, 7), far))
    types, lengths = gs.shortest_path_edge_types(graph, torch.randint(0, 3, (B, N, N)), 4)
    yield score("graphormer edges", gs.generate_graphormer_edge_bias(torch.randn(H, 4, 3), types, lengths))


def eager(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, mask_mod: Any) -> Tensor:
    """FlexAttention's own eager result; for a mask, from its own dense mask, where a row may see nothing."""
    if mask_mod is None:
        return flex_attention(q, k, v, score_mod=score_mod)
    dense = create_mask(mask_mod, B, H, q.shape[2], k.shape[2], device="cpu")
    return ((q @ k.mT) * D**-0.5).masked_fill(~dense, -float("inf")).softmax(-1).nan_to_num(0) @ v


@pytest.mark.parametrize(("score_mod", "mask_mod", "n", "m"), [pytest.param(*case[1:], id=case[0]) for case in cases()])
@pytest.mark.parametrize("backend", ["band", "reference"])
def test_runs_unmodified_and_agrees(score_mod, mask_mod, n, m, backend):
    torch.manual_seed(1)
    q, k, v = torch.randn(B, H, n, D), torch.randn(B, H, m, D), torch.randn(B, H, m, D)
    spec = saccade.Attention(score=score_mod, mask=mask_mod)
    with classified():
        ours = saccade.attention(q, k, v, spec, backend=backend)
    torch.testing.assert_close(ours, eager(q, k, v, score_mod, mask_mod), rtol=1e-5, atol=2e-6)


def test_no_program_of_the_peer_is_left_out():
    offered = {n for module in (gm, gs) for n in dir(module) if n.startswith("generate") or n.endswith("mask_mod")}
    used = Path(__file__).read_text()
    assert len(offered) > 20 and not {name for name in offered if name not in used}


def test_a_function_that_does_not_broadcast_is_noticed():
    spec = saccade.Attention(mask=gm.generate_vision_cross_attention_mask_mod(torch.tensor([[0, 9], [9, 20]]), 8))
    saccade.attention(torch.randn(1, 1, 20, 8), torch.randn(1, 1, 16, 8), torch.randn(1, 1, 16, 8), spec)
    assert spec.mask._call.broadcasts is False
    plain = saccade.Attention(mask=gm.causal_mask)
    saccade.attention(*(torch.randn(1, 1, 20, 8) for _ in range(3)), plain)
    assert plain.mask._call.broadcasts is True
