"""Options that name a device and a precision, and loading a model accordingly."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from tessella.cli.session import CommandError


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
    typer.Option(help="Of activations and of weights that are not 4-bit; auto: as stored."),
]


def check_device(device: Device) -> str:
    """The device's name for torch. Raises CommandError when torch cannot use it."""
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    return device.value


def throughput_dtype(device: Device) -> DType:
    """What many tokens at a time are computed in when the user does not say.

    On a CPU without 16-bit dot products torch's bfloat16 matrix products take several times as
    long as float32 ones, in which every 16-bit weight is exact. (One token at a time is bound by
    memory, where fewer bytes win; so this is not the rule for generation.)
    """
    import torch

    slow = device is Device.cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return DType.float32 if slow else DType.auto


def load_model(model: str, device: Device, dtype: DType) -> tuple:
    """(model, tokenizer) of any Hugging Face checkpoint, converted or not, ready to run.

    Raises CommandError or :class:`~tessella.models.errors.CheckpointError`.
    """
    name = check_device(device)
    import torch

    from tessella.integrations import hf

    return hf.load(
        model, device=name, dtype="auto" if dtype is DType.auto else getattr(torch, dtype.value)
    )
