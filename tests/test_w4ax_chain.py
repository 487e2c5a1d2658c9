"""The chain of a transformer block's linear layers that `tessella bench w4ax_chain` times."""

from __future__ import annotations

import pytest
import torch

from tessella import ops
from tessella.bench import w4ax_chain
from tessella.formats import PackedW4
from tessella.testing.force import environment

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("M", (1, 70))
def test_a_chain_computes_what_its_ops_do(M):
    """The chain on buffers, with programmatic launch, against the plain ops one by one."""
    block = w4ax_chain.Block(256, 256, 128, 384)
    chain = w4ax_chain.Chain(block, "twolevel", M, layers=2)
    out, h = chain.out.clone(), chain.h[0].clone()

    def product(a, blob, N):
        return ops.w4ax_gemm(a, PackedW4(blob, "twolevel", N, a.Kp))

    with environment(PDL="0"):
        for i in range(4):
            blobs, norms = chain.blobs[i % 2], chain.norms[i % 2]
            a, _, h = ops.rms_norm_quant(out, norms[0], w4ax_chain.EPS, h)
            qkv = product(a, blobs[0], 384)
            o = product(ops.act_quant(qkv[:, :256]), blobs[1], 256)
            a, _, h = ops.rms_norm_quant(o, norms[1], w4ax_chain.EPS, h)
            gate_up = product(a, blobs[2], 768)
            out = product(ops.silu_mul_quant(gate_up[:, :384], gate_up[:, 384:]), blobs[3], 256)
    for i in range(4):
        chain(i)
    assert torch.equal(chain.out, out) and torch.equal(chain.h[0], h)


@pytest.mark.parametrize("kind", w4ax_chain.RIVALS)
def test_rival_chains_run(kind):
    chain = w4ax_chain.RivalChain(w4ax_chain.Block(256, 256, 128, 384), kind, 16)
    for i in range(3):
        chain(i)
    assert chain.out.shape == (16, 256) and bool(chain.out.isfinite().all())
