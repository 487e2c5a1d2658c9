"""What a user would run on a CPU instead of w4ax_gemm. Every rival computes ``x @ w^T``.

Each holds several copies of its weight, to be run in turn, so that no copy is in a cache. What a
rival does to its activations before the product is timed when it belongs to the call in practice
(onnxruntime, OpenVINO and FBGEMM quantise inside), and not when the caller hands over the result.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tessella import _native

G = 128
"""Group size of the 4-bit rivals."""


def int4_groups(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 4-bit groups: codes uint8 [N, K] with zero point 8, and scales fp32 [N, K/G]."""
    N, K = w_NK.shape
    groups = w_NK.float().view(N, K // G, G)
    s = groups.abs().amax(2, keepdim=True).clamp(min=1e-8) / 7
    q = (groups / s).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    return q.view(N, K), s[..., 0]


def int8_channels(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit rows: codes int8 [N, K] and scales fp32 [N]."""
    s = w_NK.abs().amax(1).float().clamp(min=1e-8) / 127
    return (w_NK.float() / s[:, None]).round_().clamp_(-127, 127).to(torch.int8), s


class Rival:
    """One way to compute ``x @ w^T``; `run(i)` with the i-th copy of the weight."""

    bytes_per_weight: float
    own_threads = False
    """Whether it has a thread pool of its own, whose size is fixed when it is built."""

    def __init__(self, w_NK: Tensor, copies: int, threads: int):
        raise NotImplementedError

    @staticmethod
    def missing() -> str | None:
        """Why it cannot run here, or None."""
        return None

    def input(self, x_MK: Tensor) -> Any:
        """bf16 activations in the form that :meth:`run` takes; not timed."""
        return x_MK

    def run(self, x: Any, i: int) -> Tensor:
        """[M, N]."""
        raise NotImplementedError


class TorchBf16(Rival):
    """torch's linear in bf16."""

    bytes_per_weight = 2

    def __init__(self, w_NK, copies, threads):
        self.ws = [w_NK.bfloat16() for _ in range(copies)]

    def run(self, x, i):
        return torch.nn.functional.linear(x, self.ws[i % len(self.ws)])


class TorchFp32(TorchBf16):
    """torch's linear in fp32."""

    bytes_per_weight = 4

    def __init__(self, w_NK, copies, threads):
        self.ws = [w_NK.float().clone() for _ in range(copies)]

    def input(self, x_MK):
        return x_MK.float()


class AtenInt4(Rival):
    """PyTorch's own 4-bit linear: int4 groups, activations in bf16."""

    bytes_per_weight = 0.5 + 4 / G

    def __init__(self, w_NK, copies, threads):
        codes, s = int4_groups(w_NK)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        self.ws = [packed.clone() for _ in range(copies)]
        self.scales_zeros = torch.stack([s, torch.zeros_like(s)], 2).transpose(0, 1)
        self.scales_zeros = self.scales_zeros.bfloat16().contiguous()

    def run(self, x, i):
        w = self.ws[i % len(self.ws)]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, G, self.scales_zeros)


class OneDnnInt8(Rival):
    """oneDNN's int8 linear on activations that are 8-bit codes already, one scale for all.

    Codes are unsigned with zero point 128: for signed ones oneDNN has no fast kernel on a CPU
    without AMX and falls back to its reference loops, 100 to 1000 times slower.
    """

    bytes_per_weight = 1

    def __init__(self, w_NK, copies, threads):
        codes, self.s = int8_channels(w_NK)
        self.zeros = torch.zeros(codes.shape[0], dtype=torch.int64)
        prepack = torch.ops.onednn.qlinear_prepack
        self.ws = [prepack(codes.clone(), None) for _ in range(copies)]

    @staticmethod
    def missing():
        isas = _native._C.cpu_isa()["supported"]
        return None if any("vnni" in isa for isa in isas) else "no fast path on a CPU without VNNI"

    def input(self, x_MK):
        s = float(x_MK.abs().amax()) / 127
        return (x_MK.float() / s).round_().add_(128).to(torch.uint8), s

    def run(self, x, i):
        codes, s = x
        w, s_w, z_w = self.ws[i % len(self.ws)], self.s, self.zeros
        return torch.ops.onednn.qlinear_pointwise(
            codes, s, 128, w, s_w, z_w, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )


class FbgemmInt8(Rival):
    """torch.ao's dynamically quantised linear: 8-bit weights, activations quantised inside."""

    bytes_per_weight = 1

    def __init__(self, w_NK, copies, threads):
        N = w_NK.shape[0]
        s, z = int8_channels(w_NK)[1], torch.zeros(N, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates it, and offers nothing as fast
            q = torch.quantize_per_channel(w_NK.float(), s, z, 0, torch.qint8)
        self.ws = [torch.ops.quantized.linear_prepack(q, None) for _ in range(copies)]

    @staticmethod
    def missing():
        ours = torch.backends.quantized.engine in ("x86", "fbgemm")
        return None if ours else "torch has no FBGEMM here"

    def input(self, x_MK):
        return x_MK.float()

    def run(self, x, i):
        return torch.ops.quantized.linear_dynamic(x, self.ws[i % len(self.ws)], True)


class OnnxRuntime(Rival):
    """onnxruntime's MatMulNBits with int8 arithmetic (accuracy level 4), fp32 in and out."""

    bytes_per_weight = 0.5 + 4 / G
    own_threads = True

    def __init__(self, w_NK, copies, threads):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # every session has threads of its own: they must not spin while the next one works
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = _matmul_nbits(w_NK)
        self.sessions = [
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(copies)
        ]

    @staticmethod
    def missing():
        needed = [p for p in ("onnxruntime", "onnx") if find_spec(p) is None]
        return f"{' and '.join(needed)} not installed" if needed else None

    def input(self, x_MK):
        return x_MK.float().numpy()

    def run(self, x, i):
        (y,) = self.sessions[i % len(self.sessions)].run(None, {"x": x})
        return torch.from_numpy(y)


def _matmul_nbits(w_NK: Tensor) -> bytes:
    """An ONNX model of one 4-bit matrix product."""
    from onnx import TensorProto, helper, numpy_helper

    (N, K), (codes, s) = w_NK.shape, int4_groups(w_NK)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(N, K // G, G // 2)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        bits=4,
        block_size=G,
        K=K,
        N=N,
        accuracy_level=4,
    )
    f32 = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", f32, ["M", K])],
        [helper.make_tensor_value_info("y", f32, ["M", N])],
        [
            numpy_helper.from_array(packed.numpy(), "w"),
            numpy_helper.from_array(s.flatten().numpy(), "s"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


class OpenVino(Rival):
    """OpenVINO's compressed fully connected layer, activations quantised in groups of 128."""

    bytes_per_weight = 0.5 + 2 / G
    own_threads = True

    def __init__(self, w_NK, copies, threads):
        import openvino as ov

        config = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": G,
            "ENABLE_CPU_PINNING": False,
        }
        model, self.memory = _compressed_linear(w_NK)  # it reads its constants when first run
        self.requests = [
            ov.compile_model(model, "CPU", config).create_infer_request() for _ in range(copies)
        ]

    @staticmethod
    def missing():
        return None if find_spec("openvino") else "openvino not installed"

    def input(self, x_MK):
        x = x_MK.float().numpy()
        for i in range(len(self.requests)):  # a model packs its weight when it is first run
            self.run(x, i)
        return x

    def run(self, x, i):
        request = self.requests[i % len(self.requests)]
        return torch.from_numpy(request.infer([x], share_inputs=True, share_outputs=True)[0])


def _compressed_linear(w_NK: Tensor) -> tuple[Any, list]:
    """An OpenVINO model of a matrix product with 4-bit groups, and the memory it refers to."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    (N, K), (codes, s) = w_NK.shape, int4_groups(w_NK)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous().numpy()
    eight, scales = np.full((1, 1, 1), 8, np.float16), s[..., None].half().contiguous().numpy()
    u4 = op.constant(ov.Tensor(packed, ov.Shape([N, K // G, G]), ov.Type.u4))
    x = op.parameter(ov.PartialShape([-1, K]), ov.Type.f32, "x")
    groups = op.multiply(op.subtract(op.convert(u4, "f16"), op.constant(eight)), scales)
    w = op.convert(op.reshape(groups, op.constant([N, K]), special_zero=False), "f32")
    return ov.Model([op.matmul(x, w, False, True)], [x]), [packed, eight, scales]


RIVALS: dict[str, type[Rival]] = {
    "torch_bf16": TorchBf16,
    "torch_fp32": TorchFp32,
    "aten_int4": AtenInt4,
    "onednn_int8": OneDnnInt8,
    "fbgemm_int8": FbgemmInt8,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}
"""By their names in the records."""
