"""Hugging Face transformers: 4-bit checkpoints load through ``from_pretrained``.

transformers builds the model without memory (meta device) and swaps each linear that the
checkpoint stores in 4 bits for a :class:`_Staged` one, whose buffers are the stored tensors.
transformers fills them like any others; then each becomes a W4AxLinear. No full-precision weight
of a quantised linear ever exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tessella.formats import W4Weight
from tessella.models.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint, read_header, read_json
from tessella.models.config import QUANT_METHOD, LayerFormat, QuantizationConfig
from tessella.models.errors import CheckpointError
from tessella.models.fuse import fuse
from tessella.models.hub import resolve
from tessella.models.linear import W4AxLinear

_STORED = {torch.uint8: "U8", torch.int32: "I32", torch.float16: "F16", torch.float32: "F32"}
"""safetensors' names of the dtypes that 4-bit linears store."""


def register() -> None:
    """Tell transformers about ``quant_method: "tessella"``; does nothing the second time."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(TessellaConfig)
        auto.register_quantizer(QUANT_METHOD)(TessellaQuantizer)


def load(
    path: str, device: str = "cpu", dtype: str | torch.dtype = "auto"
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, from a folder or a hub id, 4-bit or not.

    Args:
        path: checkpoint folder or hub id.
        device: where the model runs.
        dtype: of activations and unquantised weights; "auto": as stored.

    Returns:
        (model in eval mode, tokenizer that pads on the left).

    Raises:
        CheckpointError: a file or a tensor is missing, cut short or damaged; a newer format
            version; an architecture that transformers does not know.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register()
    folder = resolve(path)
    config = read_json(folder / CONFIG)
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == QUANT_METHOD:
        QuantizationConfig.from_dict(quantization, str(folder / CONFIG))
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        Checkpoint.open(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as e:
        raise CheckpointError(f"{folder}: transformers cannot load it: {e}") from e
    if lost := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder}: expected a tensor {lost[0]!r}, found none")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


class TessellaConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers carries it: the fields of config.json, unchecked.

    They are checked when a model is loaded, where the file can be named.
    """

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)
        self.quant_method = QUANT_METHOD


class TessellaQuantizer(HfQuantizer):
    """Swaps linears for 4-bit ones while transformers loads a converted checkpoint."""

    def __init__(self, quantization_config: TessellaConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "tessella: expected a converted checkpoint, got one in full precision; convert "
                "it with `tessella quantize` or tessella.models.convert.convert"
            )

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        file = str(Path(model.config.name_or_path) / CONFIG)
        config = QuantizationConfig.from_dict(self.quantization_config.to_dict(), file)
        if checkpoint_files is None:
            raise CheckpointError(f"{file}: expected checkpoint files to load, got a state_dict")
        self._stored = _open([Path(f) for f in checkpoint_files])
        self._names: dict[str, str] = {}  # module name -> name in the checkpoint
        modules = dict(model.named_modules())
        for name, layer_format in config.layers.items():
            module = _find_linear(model, modules, name, file)
            if module is None:
                continue
            staged = _Staged(modules[module], layer_format)
            staged.check(self._stored, name)
            model.set_submodule(module, staged)
            self._names[module] = name
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        from tessella.integrations import attention  # transformers may be half imported above

        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise CheckpointError("tessella: tensor parallelism is not supported, got a tp_plan")
        for module, name in self._names.items():
            staged = model.get_submodule(module)
            model.set_submodule(module, staged.finish(self._stored, name))
        fuse(model)
        attention.use(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _open(files: list[Path]) -> Checkpoint:
    """The checkpoint that transformers found in these files, which may have names of their own."""
    folder = files[0].parent
    if all(f.parent == folder for f in files) and (
        (folder / INDEX).exists() or files == [folder / WEIGHTS]
    ):
        return Checkpoint.open(folder)
    tensors = {name: info for f in files for name, info in read_header(f).items()}
    return Checkpoint(folder, {}, tensors)


def _find_linear(
    model: nn.Module, modules: dict[str, nn.Module], name: str, file: str
) -> str | None:
    """The model's name of the checkpoint's linear `name`.

    A bare backbone (AutoModel) lacks the prefix, and has no head: None. Raises CheckpointError
    when the model has no such linear.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if isinstance(modules.get(candidate), nn.Linear):
            return candidate
    if not name.startswith(prefix):
        return None
    raise CheckpointError(
        f"{file}: quantization_config.layers: {name!r}: {type(model).__name__} has no such linear"
    )


class _Staged(nn.Module):
    """A linear while it is loaded: the stored tensors as buffers, with their exact dtypes."""

    def __init__(self, linear: nn.Linear, layer_format: LayerFormat):
        super().__init__()
        self.format = layer_format
        N, K = linear.out_features, linear.in_features
        self.in_features, self.out_features = K, N
        self.spec = W4Weight.spec(layer_format.scheme, N, K)
        if layer_format.perm:
            self.spec["perm"] = (torch.int32, (K,))
        for field, (dtype, shape) in self.spec.items():
            self.register_buffer(field, torch.empty(shape, dtype=dtype, device="meta"))
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach())

    def check(self, stored: Checkpoint, name: str) -> None:
        """Refuse (CheckpointError) a checkpoint without, or with other, tensors of this linear."""
        wanted = [f"{name}.{field}" for field in self.spec]
        if self.bias is not None:
            wanted.append(f"{name}.bias")
        stored.require(wanted)
        for field, (dtype, shape) in self.spec.items():
            info = stored.tensors[f"{name}.{field}"]
            if (info.dtype, info.shape) != (_STORED[dtype], shape):
                raise CheckpointError(
                    f"{info.file}: tensor '{name}.{field}': expected {_STORED[dtype]} {shape}, "
                    f"got {info.dtype} {info.shape}"
                )

    def finish(self, stored: Checkpoint, name: str) -> W4AxLinear:
        """The linear that runs, once the buffers are filled."""
        tensors = {f: self._exact(f, stored, f"{name}.{f}") for f in self.spec}
        perm = tensors.pop("perm", None)
        linear = W4AxLinear(
            W4Weight.from_tensors(tensors, self.format.scheme, self.in_features),
            k8=self.format.k8,
            granularity=self.format.granularity,
            perm=perm,
            hadamard=self.format.hadamard,
            bias=self.bias,
        ).train(self.training)
        if hook := getattr(self, "_hf_hook", None):  # accelerate's, for several devices
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(linear, hook)
        return linear

    def _exact(self, field: str, stored: Checkpoint, name: str) -> Tensor:
        """A loaded buffer, or the stored tensor where the loader changed its dtype.

        Some versions of transformers cast floating-point buffers to the model's dtype.
        """
        t = self._buffers[field]
        if t.is_meta and hasattr(self, "_hf_hook"):  # without a hook: device_map="meta"
            raise CheckpointError(
                f"{stored.tensors[name].file}: tensor {name!r} was left on the disk: "
                "4-bit linears cannot be offloaded there; use another device_map"
            )
        dtype, _ = self.spec[field]
        return t if t.dtype == dtype else stored.read(name).to(t.device)


register()
