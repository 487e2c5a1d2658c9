"""W4AxLinear: the linear layer of a 4-bit model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tessella.formats import BLOCK_K, PackedW4, W4Weight
from tessella.ops import w4_pack, w4_unpack
from tessella.quant.fmpq import rotate_blocks
from tessella.quant.recipe import Recipe

if TYPE_CHECKING:
    from tessella.models.join import Joined

_act_quant = torch.ops.tessella.act_quant.default
_w4ax_gemm = torch.ops.tessella.w4ax_gemm.default
_w4ax_linear = torch.ops.tessella.w4ax_linear.default


@torch.compiler.assume_constant_result
def compiled(op: str, device: str) -> bool:
    """Whether this build has a kernel of its own for an op on a kind of device."""
    return _has_kernel(op, {"cpu": "CPU", "cuda": "CUDA"}.get(device, "PrivateUse1"))


@cache
def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"tessella::{op}", key)


def share(
    x: Tensor,
    k8: int,
    granularity: str,
    blocks: Sequence[Tensor],
    *,
    order: object = None,
    constant: bool = False,
) -> None:
    """Keep the ActBlocks of `x` with it, for the next linear that reads the same tensor.

    The tensor's version counter tells if it was changed in place since. Inference tensors have
    none: there the note is kept only when the caller knows that nobody changes x (`constant`).
    `order` is the :attr:`W4AxLinear.order` of the linears that the blocks are for.
    Compiled graphs cannot carry it.
    """
    if torch.compiler.is_compiling() or (x.is_inference() and not constant):
        return
    x._tessella_blocks = (_version(x), k8, granularity, order, blocks)


def shared(x: Tensor, k8: int, granularity: str, order: object = None) -> Sequence[Tensor] | None:
    """The blocks that :func:`share` kept with `x`, if they still describe it."""
    if torch.compiler.is_compiling():
        return None
    note = getattr(x, "_tessella_blocks", None)
    if note is None or note[:4] != (_version(x), k8, granularity, order):
        return None
    return note[4]


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


class W4AxLinear(nn.Module):
    """``y = dequant(quant(x)) @ dequant(w)^T + bias`` with a 4-bit weight w [N, K].

    The weight lives in one buffer, `blob`, in the order that its device's kernels stream it
    (:class:`~tessella.formats.PackedW4`). It is uint8, scales included, so ``.half()`` or
    ``.to(torch.bfloat16)`` cannot touch it. Whatever leaves the module is canonical
    (:class:`~tessella.formats.W4Weight`): ``state_dict()``, ``deepcopy``, ``pickle`` and moves
    to another kind of device go through the bijective unpack.

    state_dict: ``codes``, ``zeros``, ``channel_scales`` and ``group_scales`` as the scheme has
    them, ``perm`` and ``bias`` if present. For inference only: nothing here has a gradient.

    Args:
        weight: the canonical weight; its device becomes the module's.
        k8: channels whose activations are INT8, a multiple of 128, the others INT4; -1: all.
        granularity: of the activation scales, "token", "class" or "block".
        perm: int32 [K] or None; column k of the weight belongs to channel perm[k] of x.
        hadamard: the weight belongs to activations whose INT4 channels are rotated, after the
            permutation, in blocks of 128 (:func:`tessella.quant.fmpq.rotate_blocks`).
        bias: [N] in the dtype of the activations, or None.

    Raises ValueError when perm, hadamard or bias does not fit the weight.
    """

    order: object
    """Equal for linears that permute and rotate alike (:meth:`quantise_as`); None: as it comes."""

    def __init__(
        self,
        weight: W4Weight,
        *,
        k8: int = -1,
        granularity: str = "token",
        perm: Tensor | None = None,
        hadamard: bool = False,
        bias: Tensor | None = None,
    ):
        super().__init__()
        self.scheme = weight.scheme
        self.in_features = weight.K
        self.out_features = weight.N
        self.k8 = k8
        self.granularity = granularity
        if hadamard and weight.K % BLOCK_K:
            raise ValueError(
                f"W4AxLinear: hadamard: expected in features in whole blocks of {BLOCK_K}, "
                f"got {weight.K}"
            )
        self.hadamard = hadamard
        self.order = None if perm is None and not hadamard else object()
        self._joined: Joined | None = None
        self.alone = False  # no other linear reads the same input: nothing to share codes with
        self.register_buffer("blob", w4_pack(weight).blob)
        self.register_buffer("perm", None if perm is None else perm.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        present = {k: t for k, t in self._buffers.items() if k != "blob" and t is not None}
        if wrong := self._mismatches(present):
            raise ValueError(f"W4AxLinear: {wrong[0]}")

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> W4AxLinear:
        """Quantise a linear layer as `recipe` says; the bias keeps its dtype.

        Raises ValueError when the weights cannot be quantised (a NaN or an inf), or the recipe has
        steps that change more than this linear.
        """
        if recipe.changes or recipe.needs:
            raise ValueError(
                f"W4AxLinear: recipe {recipe.name!r} has steps that change whole layers or look at "
                "their inputs; convert a checkpoint with it"
            )
        weight = recipe.quantize(linear.weight.detach())
        k8 = recipe.k8_of(linear.in_features)
        return cls(weight, k8=k8, granularity=recipe.granularity, bias=linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] bf16, fp16 or (CPU) fp32 -> [..., N] of the same dtype.

        Raises ValueError when the last dimension of x is not K. The result carries no gradient.
        """
        if x.shape[-1] != self.in_features:
            got = tuple(x.shape)
            raise ValueError(f"W4AxLinear: x: expected [..., {self.in_features}], got {got}")
        if self._joined is not None and (y := self._joined.product(self, x)) is not None:
            return y
        if self._fused(x):
            y_MN = _w4ax_linear(
                self._rows(x),
                self.blob,
                self.scheme,
                self.out_features,
                self.k8,
                self.granularity,
                self.perm,
                self.bias,
            )
            return y_MN.view(*x.shape[:-1], self.out_features)
        return self.multiply(self._quantise(x), x.shape[:-1], x.dtype)

    def _fused(self, x: Tensor) -> bool:
        """Whether to quantise x within the product's op: nobody else has use for the codes.

        On CPUs, where a call of an op costs 10 us of a decode step's 70 to 300; CUDA graphs have no
        such cost.
        """
        if not self.alone or self.hadamard or x.device.type != "cpu":
            return False
        fresh = shared(x, self.k8, self.granularity, self.order) is None
        return fresh and compiled("w4ax_linear", x.device.type)

    def _rows(self, x: Tensor) -> Tensor:
        """x as [M, K] with unit stride along K."""
        x_MK = x.reshape(-1, self.in_features)
        return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()

    def join(self, joined: Joined | None) -> None:
        """From now on take the result from a product with others, where that can be had."""
        self._joined = joined

    def quantises_like(self, other: W4AxLinear) -> bool:
        """Whether both make the same codes of the same input."""
        kinds = {(w.k8, w.granularity, w.hadamard, w.perm is None) for w in (self, other)}
        return len(kinds) == 1 and (self.perm is None or torch.equal(self.perm, other.perm))

    def quantise_as(self, other: W4AxLinear) -> None:
        """Take the codes of an input where `other`, which makes the same, made them already."""
        self.order = other.order

    def multiply(self, blocks: Sequence[Tensor], leading: torch.Size, dtype: torch.dtype) -> Tensor:
        """Quantised activations (codes8, codes4, sums, scales) -> y [*leading, N] of `dtype`."""
        y_MN = _w4ax_gemm(
            *blocks,
            self.blob,
            self.scheme,
            self.out_features,
            self.granularity,
            self.bias,
            dtype,
        )
        return y_MN.view(*leading, self.out_features)

    def _quantise(self, x: Tensor) -> Sequence[Tensor]:
        """x in ActBlocks, once for all linears that read this very tensor and quantise alike."""
        if (blocks := shared(x, self.k8, self.granularity, self.order)) is not None:
            return blocks
        x_MK, perm = self._rows(x), self.perm
        if self.hadamard:
            x_MK = x_MK if perm is None else x_MK[:, perm]
            x_MK, perm = rotate_blocks(x_MK, self.k8), None
        blocks = _act_quant(x_MK, self.k8, self.granularity, perm)
        share(x, self.k8, self.granularity, blocks, order=self.order)
        return blocks

    def weight(self) -> W4Weight:
        """The canonical weight, a fresh copy on the module's device."""
        return w4_unpack(PackedW4(self.blob, self.scheme, self.out_features, self.in_features))

    def extra_repr(self) -> str:
        k8 = "all" if self.k8 < 0 else self.k8
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, granularity={self.granularity}, k8={k8}, "
            f"perm={self.perm is not None}, hadamard={self.hadamard}, "
            f"bias={self.bias is not None}"
        )

    def _spec(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """dtype (None: any float) and shape of every tensor in the state_dict."""
        spec: dict = W4Weight.spec(self.scheme, self.out_features, self.in_features)
        if self.perm is not None:
            spec["perm"] = (torch.int32, (self.in_features,))
        if self.bias is not None:
            spec["bias"] = (None, (self.out_features,))
        return spec

    def _mismatches(self, tensors: dict[str, Tensor], prefix: str = "") -> list[str]:
        """A sentence for each tensor of another dtype or shape than expected."""
        sentences = []
        for name, (dtype, shape) in self._spec().items():
            t = tensors.get(name)
            fits = t is None or (t.dtype == dtype if dtype else t.is_floating_point())
            if t is not None and not (fits and tuple(t.shape) == shape):
                sentences.append(
                    f"{prefix}{name}: expected {dtype or 'floating point'} {shape}, "
                    f"got {t.dtype} {tuple(t.shape)}"
                )
        return sentences

    def _pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """The blob of a canonical weight's tensors, on their device."""
        return w4_pack(W4Weight.from_tensors(tensors, self.scheme, self.in_features)).blob

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + f: t for f, t in self.weight().tensors().items()})
        for name in ("perm", "bias"):
            if (t := self._buffers[name]) is not None:
                destination[prefix + name] = t if keep_vars else t.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        given = {k[len(prefix) :]: t for k, t in state_dict.items() if k.startswith(prefix)}
        spec = self._spec()
        if strict:
            missing_keys += [prefix + name for name in spec if name not in given]
            unexpected_keys += [prefix + name for name in given if name not in spec]
        if wrong := self._mismatches(given, prefix):
            error_msgs += wrong
            return
        fields = W4Weight.spec(self.scheme, self.out_features, self.in_features)
        if fields.keys() <= given.keys():
            device = None if self.blob.is_meta else self.blob.device
            self._assign("blob", self._pack({f: given[f].to(device) for f in fields}))
        for name in ("perm", "bias"):
            if name in spec and name in given:
                assign = local_metadata.get("assign_to_params_buffers", False)
                self._assign(name, given[name].detach(), assign)

    def _assign(self, name: str, value: Tensor, assign: bool = False) -> None:
        """Copy into a buffer in place (a captured CUDA graph sees it), or replace a meta one."""
        old = self._buffers[name]
        if name == "perm" and (old.is_meta or not torch.equal(old, value.to(old.device))):
            self.order = object()  # no longer that of the others
        if old.is_meta or assign:
            self._buffers[name] = value
        else:
            old.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W4AxLinear:
        probe = fn(self.blob.new_empty(0))
        if probe.dtype != torch.uint8:
            raise TypeError(
                "W4AxLinear: expected a move between devices or a cast of floating-point tensors, "
                f"got a cast of 4-bit codes to {probe.dtype}"
            )
        if probe.device.type == self.blob.device.type:
            return super()._apply(fn, recurse)
        device = probe.device
        weight = {  # what to_empty() makes of a meta tensor must still be a valid weight
            f: torch.zeros_like(t, device=device) if t.is_meta else t.to(device)
            for f, t in self.weight().tensors().items()
        }
        blob = self._pack(weight)
        if self._joined is not None:
            self._joined.forget()
        self._buffers["blob"] = blob.new_empty(0)
        super()._apply(fn, recurse)
        self._buffers["blob"] = blob
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_joined": None}  # a copy is on its own
        state["_buffers"] = {k: t for k, t in self._buffers.items() if k != "blob"}
        state["_weight"] = self.weight().tensors()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        weight = state.pop("_weight")
        super().__setstate__(state)
        self._buffers = {"blob": self._pack(weight), **self._buffers}
