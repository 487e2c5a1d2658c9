"""Options that name a device and a precision, and loading a model accordingly."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from tessella.cli.session import CommandError

if TYPE_CHECKING:
    import torch


class Device(str, Enum):
    """Where a command computes."""

    cpu = "cpu"
    cuda = "cuda"


class DType(str, Enum):
    """What activations and unconverted weights are computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
DTypeOption = Annotated[
    DType,
    typer.Option(
        help="Precision of activations and of weights that are not 4-bit; auto: the "
        "checkpoint's own, or float32 on a CPU without 16-bit arithmetic."
    ),
]


def check_device(device: Device) -> str:
    """The device's name for torch. Raises CommandError when torch cannot use it."""
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    return device.value


def working_dtype(dtype: DType, device: str) -> str | torch.dtype:
    """What to load a model in: a torch dtype, or "auto" for the checkpoint's own.

    On a CPU without 16-bit dot products torch emulates bfloat16 matrix products a hundred times
    slower than float32; float32 holds every 16-bit weight exactly.
    """
    import torch

    if dtype is not DType.auto:
        return getattr(torch, dtype.value)
    if device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return "auto"


def load_model(model: str, device: Device, dtype: DType) -> tuple:
    """(model, tokenizer) of any Hugging Face checkpoint, converted or not, ready to run.

    Raises CommandError or :class:`~tessella.models.errors.CheckpointError`.
    """
    name = check_device(device)
    from tessella.integrations import hf

    return hf.load(model, device=name, dtype=working_dtype(dtype, name))
