"""Fewer passes over the hidden state: norms and gated MLPs that quantise as they go.

In a decoder layer as it is converted every linear quantises its own input. After :func:`fuse` the
norm before the attention and the one before the MLP quantise what they normalise, once for the two
or three linears that read it, and the MLP's gate quantises its product; the output projection and
the head, whose input nobody else reads, quantise it within their own op. Of seven act_quant calls a
layer and a dozen small torch ops, three fused ops are left. The linears that read a fused norm
become one product (:mod:`tessella.models.join`): of seven, four are left. Names and tensors in the
state_dict stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.models.join import Joined
from tessella.models.linear import W4AxLinear, compiled, share

_rms_norm_quant = torch.ops.tessella.rms_norm_quant.default
_silu_mul_quant = torch.ops.tessella.silu_mul_quant.default


class RMSNormQuant(nn.Module):
    """RMS norm that also quantises its result for the :class:`W4AxLinear` modules reading it.

    Args:
        norm: the module to replace, with `weight` and `variance_epsilon`; the weight is shared.
        reader: one of the linears that read the result; all of them quantise alike.
    """

    def __init__(self, norm: nn.Module, reader: W4AxLinear):
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon
        self.k8, self.granularity = reader.k8, reader.granularity
        self._reader = (reader,)  # in a tuple, which makes it no submodule
        self.train(norm.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """h [..., K] -> weight * h / rms(h), rounded as transformers' modules round."""
        K = hidden_states.shape[-1]
        if not compiled("rms_norm_quant", hidden_states.device.type):
            h = hidden_states.float()
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * h.to(hidden_states.dtype)
        *blocks, y_MK, _ = _rms_norm_quant(
            hidden_states.reshape(-1, K),
            self.weight,
            self.variance_epsilon,
            None,
            self.k8,
            self.granularity,
            self._reader[0].perm,
        )
        y = y_MK.view(hidden_states.shape)
        order = self._reader[0].order
        # constant: read by known linears only
        share(y, self.k8, self.granularity, blocks, order=order, constant=True)
        return y

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` on 4-bit linears, quantising each operand once.

    Args:
        mlp: the module to replace; its three projections are moved, not copied.
    """

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., K]."""
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if down.hadamard or not compiled("silu_mul_quant", x.device.type):
            return down(nn.functional.silu(gate) * up)
        K = down.in_features
        blocks = _silu_mul_quant(
            gate.view(-1, K), up.view(-1, K), down.k8, down.granularity, down.perm
        )
        return down.multiply(blocks, x.shape[:-1], x.dtype)


class RowsLinear(nn.Linear):
    """A dense output head that multiplies rows, whatever strides they come with.

    A prompt's last token, sliced from its batch, has a batch stride that makes torch's matmul copy
    the whole weight first, 12 to 100 times the time of the product (torch 2.13, CPU).

    Args:
        linear: the module to replace; weight and bias are shared, ties stay.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return super().forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)


def flatten_head(model: nn.Module) -> None:
    """Replace a dense output head by :class:`RowsLinear`."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.endswith("lm_head"):
            model.set_submodule(name, RowsLinear(module))


def fuse(model: nn.Module) -> int:
    """Replace what can be in a converted model; returns the number of modules replaced.

    Norms whose readers all are 4-bit linears that quantise alike, permuted alike if at all, and
    MLPs with the silu activation whose projections all are 4-bit. A dense head is replaced too and
    not counted. Everything else stays as it is; linears that rotate what they read do it
    themselves, once for those that read the same tensor.
    """
    flatten_head(model)
    replaced = 0
    for layer in list(model.modules()):
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None:
            continue
        readers = {
            "input_layernorm": _projections(attention),
            "post_attention_layernorm": [getattr(mlp, f"{p}_proj", None) for p in ("gate", "up")],
        }
        for name, linears in readers.items():
            norm = getattr(layer, name, None)
            if not _alike(linears):
                continue
            for linear in linears[1:]:
                linear.quantise_as(linears[0])
            if _is_rms_norm(norm) and not linears[0].hadamard:
                setattr(layer, name, RMSNormQuant(norm, linears[0]))
                replaced += 1
                if Joined.fits(linears):
                    Joined(linears)
        if _is_gated_mlp(mlp):
            layer.mlp = GatedMLP(mlp)
            replaced += 1
    for name, module in model.named_modules():
        if isinstance(module, W4AxLinear) and name.endswith(("self_attn.o_proj", "lm_head")):
            module.alone = True
    return replaced


def _projections(attention: nn.Module) -> list[nn.Module | None]:
    """The linears that read an attention's input; None for one that is not there."""
    if (latent := getattr(attention, "kv_a_proj_with_mqa", None)) is not None:
        return [getattr(attention, "q_proj", getattr(attention, "q_a_proj", None)), latent]
    return [getattr(attention, f"{p}_proj", None) for p in "qkv"]


def _is_rms_norm(norm: nn.Module | None) -> bool:
    """transformers' plain RMS norm: ``weight * norm(h)`` without an offset to the weight."""
    return type(norm).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def _alike(linears: list[nn.Module | None]) -> bool:
    """4-bit linears that would quantise the same input to the same codes."""
    if not all(isinstance(linear, W4AxLinear) for linear in linears):
        return False
    return all(linears[0].quantises_like(linear) for linear in linears[1:])


def _is_gated_mlp(mlp: nn.Module) -> bool:
    projections = [getattr(mlp, f"{p}_proj", None) for p in ("gate", "up", "down")]
    silu = isinstance(getattr(mlp, "act_fn", None), nn.SiLU) or (
        type(getattr(mlp, "act_fn", None)).__name__ == "SiLUActivation"
    )
    known = type(mlp).__name__ in ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
    return known and silu and all(isinstance(p, W4AxLinear) for p in projections)
