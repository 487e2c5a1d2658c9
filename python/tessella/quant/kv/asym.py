"""Asymmetric codes with one scale and zero per (token, head), or per group of channels of it.

The grid of QServe (section 5.2: KV4 with per-head dynamic scales and zeros, kept in the page).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tessella.formats_kv import KVCodec
from tessella.quant.kv.base import Part, asymmetric


@dataclass(frozen=True)
class Groups(Part):
    """Scales per `group` channels of a (token, head); without this part the group is D."""

    group: int

    @property
    def word(self) -> str:
        """g32 or g64."""
        return f"g{self.group}"

    def grid(self, pages: KVCodec) -> KVCodec:
        return replace(pages, group=self.group)


def published(k_SJD: Tensor, v_SJD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """QServe's KV cache: asymmetric per (token, head), no group along the channels."""
    return asymmetric(k_SJD.float(), bits), asymmetric(v_SJD.float(), bits)
