"""W4AxLinear, quantization_config, the architectures and the checkpoint reader."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tessella.formats import FORMAT_VERSION, SCHEMES, W4Weight
from tessella.models.checkpoint import Checkpoint, read_header
from tessella.models.config import LayerFormat, QuantizationConfig
from tessella.models.errors import CheckpointError
from tessella.models.linear import W4AxLinear
from tessella.models.presets import ARCHITECTURES, architecture
from tessella.quant import rtn
from tessella.quant.recipe import PRESETS, Recipe
from tessella.ref import w4ax_gemm as ref
from tessella.ref.act_quant import act_quant

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def linear(scheme="twolevel", N=72, K=200, bias=True, dtype=torch.bfloat16, **kwargs) -> W4AxLinear:
    """A module with random weights, and bias."""
    g = torch.Generator().manual_seed(7)
    w = rtn.quantize(torch.randn(N, K, generator=g), scheme)
    b = torch.randn(N, generator=g).to(dtype) if bias else None
    return W4AxLinear(w, bias=b, **kwargs)


def expected(m: W4AxLinear, x: torch.Tensor) -> torch.Tensor:
    """The reference of m(x), in fp64."""
    a = act_quant(x.reshape(-1, x.shape[-1]), m.k8, m.granularity, m.perm)
    return ref.w4ax_gemm(a, m.weight(), m.bias).view(*x.shape[:-1], m.out_features)


def close(y: torch.Tensor, y_ref: torch.Tensor) -> bool:
    eps = torch.finfo(y.dtype).eps
    return torch.allclose(y.double(), y_ref, rtol=2 * eps, atol=2 * eps * y_ref.abs().max().item())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parity_with_the_reference(scheme, dtype, rng):
    m = linear(scheme, dtype=dtype)
    x = torch.randn(5, 200, generator=rng).to(dtype)
    y = m(x)
    assert y.dtype == dtype and close(y, expected(m, x))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"granularity": "block"},
        {"granularity": "class", "k8": 128},
        {"granularity": "block", "k8": 128},
        {"k8": 0},
        {"perm": torch.randperm(200, generator=torch.Generator().manual_seed(3)).int()},
        {"bias": False},
    ],
    ids=str,
)
def test_parity_of_every_kind_of_activation(kwargs, rng):
    m = linear(**kwargs)
    x = torch.randn(3, 200, generator=rng).to(torch.bfloat16)
    assert close(m(x), expected(m, x))


@pytest.mark.parametrize("shape", [(200,), (1, 200), (2, 3, 200), (2, 1, 2, 200)])
def test_leading_dimensions(shape, rng):
    m = linear()
    x = torch.randn(shape, generator=rng).to(torch.bfloat16)
    y = m(x)
    assert y.shape == (*shape[:-1], 72)
    assert torch.equal(y.view(-1, 72), m(x.view(-1, 200)))


@pytest.mark.parametrize("shape", [(0, 200), (2, 0, 200)])
def test_an_empty_batch(shape):
    assert linear()(torch.empty(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 72)


def test_strided_activations(rng):
    m = linear()
    wide = torch.randn(4, 400, generator=rng).to(torch.bfloat16)
    columns = torch.randn(200, 4, generator=rng).to(torch.bfloat16)
    for x in (wide[:, :200], wide[::2, 200:], wide[:, ::2], columns.T):
        assert torch.equal(m(x), m(x.clone(memory_format=torch.contiguous_format)))


def test_other_input_sizes_are_refused():
    with pytest.raises(ValueError, match=r"x: expected \[..., 200\], got \(2, 400\)"):
        linear()(torch.zeros(2, 400, dtype=torch.bfloat16))


def test_arguments_that_do_not_fit_the_weight():
    w = rtn.quantize(torch.ones(8, 128), "g128")
    with pytest.raises(ValueError, match=r"perm: expected torch.int32 \(128,\), got torch.int64"):
        W4AxLinear(w, perm=torch.arange(128))
    with pytest.raises(ValueError, match=r"bias: expected floating point \(8,\), got .*\(9,\)"):
        W4AxLinear(w, bias=torch.zeros(9))


@pytest.mark.parametrize(
    "recipe", [r for r in PRESETS.values() if not r.needs], ids=lambda r: r.name
)
def test_from_linear(recipe, rng):
    dense = nn.Linear(256, 64, dtype=torch.bfloat16)
    m = W4AxLinear.from_linear(dense, recipe)
    w = recipe.quantize(dense.weight)
    assert all(torch.equal(t, m.weight().tensors()[f]) for f, t in w.tensors().items())
    assert torch.equal(m.bias, dense.bias) and not m.bias.requires_grad
    x = torch.randn(16, 256, generator=rng).to(torch.bfloat16)
    y, y_dense = m(x).float(), dense(x).float()
    assert (y - y_dense).norm() / y_dense.norm() < (0.2 if recipe.k8 == 0 else 0.1)
    with torch.no_grad():
        dense.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="row 3, column 4"):
        W4AxLinear.from_linear(dense, recipe)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_is_canonical(scheme, rng):
    perm = torch.arange(199, -1, -1, dtype=torch.int32)
    m = linear(scheme, perm=perm)
    state = m.state_dict()
    spec = W4Weight.spec(scheme, 72, 200)
    assert state.keys() == {*spec, "perm", "bias"}
    for field, (dtype, shape) in spec.items():
        assert (state[field].dtype, tuple(state[field].shape)) == (dtype, shape)
    other = W4AxLinear(
        rtn.quantize(torch.ones(72, 200), scheme),
        perm=torch.zeros_like(perm),
        bias=torch.zeros(72, dtype=torch.bfloat16),
    )
    blob = other.blob.data_ptr()
    other.load_state_dict(state)
    assert other.blob.data_ptr() == blob, "loading copies in place, for captured graphs"
    x = torch.randn(3, 200, generator=rng).to(torch.bfloat16)
    assert torch.equal(other(x), m(x))


def test_state_dict_inside_a_model():
    model = nn.ModuleDict({"a": linear(), "b": nn.Linear(2, 2)})
    state = model.state_dict()
    assert {"a.codes", "a.zeros", "a.channel_scales", "a.group_scales", "a.bias"} < state.keys()
    assert "a.blob" not in state
    copy.deepcopy(model).load_state_dict(state)


def test_load_state_dict_names_what_does_not_fit():
    m = linear()
    before = m.blob.clone()
    state = m.state_dict()
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"zeros".*Unexpected key.*"more"'):
        m.load_state_dict(
            {"more": state["bias"], **{k: t for k, t in state.items() if k != "zeros"}}
        )
    state["channel_scales"] = state["channel_scales"].half()
    with pytest.raises(
        RuntimeError, match=r"channel_scales: expected torch.float32 \(72,\), got torch.float16"
    ):
        m.load_state_dict(state)
    assert torch.equal(m.blob, before), "a refused state leaves the weight alone"


def save_and_load(m):
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies(scheme, duplicate, rng):
    m = linear(scheme, perm=torch.arange(200, dtype=torch.int32))
    x = torch.randn(3, 200, generator=rng).to(torch.bfloat16)
    y = m(x)
    other = duplicate(m)
    m.blob.zero_()
    assert torch.equal(other(x), y) and other.extra_repr() == m.extra_repr()
    assert list(other.state_dict()) == list(m.state_dict())


def test_a_pickle_holds_the_canonical_weight():
    state = linear().__getstate__()
    assert "blob" not in state["_buffers"]
    assert state["_weight"].keys() == W4Weight.spec("twolevel", 72, 200).keys()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_casts_leave_codes_and_scales_alone(scheme, dtype):
    m = nn.Sequential(linear(scheme))
    before = {k: t.clone() for k, t in m.state_dict().items()}
    for cast in (lambda m: m.to(dtype), lambda m: m.to("cpu", dtype), lambda m: m.half().float()):
        for name, t in cast(copy.deepcopy(m)).state_dict().items():
            if name != "0.bias":
                assert t.dtype == before[name].dtype and torch.equal(t, before[name]), name
    assert m.to(dtype).state_dict()["0.bias"].dtype == dtype


def test_codes_cannot_be_cast():
    with pytest.raises(TypeError, match=r"4-bit codes to torch.float16"):
        linear().type(torch.float16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_moves_between_kinds_of_device(scheme, rng):
    m = linear(scheme)
    x = torch.randn(3, 200, generator=rng).to(torch.bfloat16)
    y, state = m(x), m.state_dict()
    meta = copy.deepcopy(m).to("meta")
    assert all(t.is_meta for t in meta.state_dict().values())
    assert meta(x.to("meta")).shape == y.shape
    back = copy.deepcopy(meta).to_empty(device="cpu")
    back.load_state_dict(state)
    assert torch.equal(back(x), y)
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x), y)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_moves_to_a_gpu_and_back(scheme):
    m = linear(scheme)
    state = {k: t.clone() for k, t in m.state_dict().items()}
    m.cuda().half()
    assert all(t.is_cuda for t in m.state_dict().values())
    for k, t in m.cpu().state_dict().items():
        assert k == "bias" or torch.equal(t, state[k]), k


def test_compiles_into_one_graph(rng):
    m = linear()
    x = torch.randn(3, 200, generator=rng).to(torch.bfloat16)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), m(x))


def test_repr_tells_format_and_shape():
    text = repr(linear(k8=128, granularity="block"))
    for part in ("in_features=200", "out_features=72", "scheme=twolevel", "block", "k8=128"):
        assert part in text


# quantization_config


def config_dict() -> dict:
    layers = {"model.layers.0.mlp.up_proj": LayerFormat("twolevel")}
    return QuantizationConfig(PRESETS["w4a8"], layers).to_dict()


def test_quantization_config_round_trips():
    d = json.loads(json.dumps(config_dict()))
    assert d["quant_method"] == "tessella" and d["format_version"] == FORMAT_VERSION
    assert QuantizationConfig.from_dict(d, "config.json").to_dict() == d


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, r"expected at most 1, got 2: .*written by a newer tessella"),
        ({"format_version": "1"}, r"format_version: expected a whole number from 1 to 1, got '1'"),
        ({"format_version": None}, r"format_version: expected a whole number.*got None"),
        ({"quant_method": "awq"}, r"quant_method: expected 'tessella', got 'awq'"),
        ({"recipe": {"name": "x", "bits": 3}}, r"expected fields name, .*got 'bits'"),
        ({"recipe": None}, r"recipe: expected a table, got None"),
        ({"layers": []}, r"layers: expected an object"),
        ({"layers": {"a": {}}}, r"layers.a: expected fields scheme, granularity, k8, perm"),
        ({"layers": {"a": {"scheme": "g7"}}}, r"layers.a: expected a scheme of channel"),
    ],
)
def test_bad_quantization_configs_name_the_file(change, message):
    with pytest.raises(CheckpointError, match=message) as e:
        QuantizationConfig.from_dict({**config_dict(), **change}, "some/config.json")
    assert str(e.value).startswith("some/config.json: ")


# Architectures


def test_architectures():
    assert list(ARCHITECTURES)[:4] == [
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    ]  # integrations add theirs
    qwen2 = architecture({"architectures": ["Qwen2ForCausalLM"]}, "f").layer_tensors({})
    assert "self_attn.q_proj.bias" in qwen2 and "self_attn.o_proj.bias" not in qwen2
    qwen3 = architecture({"architectures": ["Qwen3ForCausalLM"]}, "f").layer_tensors({})
    assert "self_attn.k_norm.weight" in qwen3
    llama = ARCHITECTURES["LlamaForCausalLM"]
    assert not any("bias" in t for t in llama.layer_tensors({"mlp_bias": False}))
    assert "mlp.up_proj.bias" in llama.layer_tensors({"mlp_bias": True})


@pytest.mark.parametrize("names", [["BloomForCausalLM"], [], None])
def test_unknown_architectures_are_refused(names):
    with pytest.raises(CheckpointError, match=r"f: architectures: expected one of Llama.*Qwen3"):
        architecture({"architectures": names}, "f")


# The checkpoint reader


def write(path, sharded: bool):
    """A checkpoint of two tensors; returns them."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    (path / "config.json").write_text("{}")
    if not sharded:
        save_file(tensors, path / "model.safetensors")
        return tensors
    for name, t in tensors.items():
        save_file({name: t}, path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("sharded", [False, True])
def test_reading(tmp_path, sharded):
    tensors = write(tmp_path, sharded)
    ckpt = Checkpoint.open(tmp_path)
    assert ckpt.tensors.keys() == tensors.keys() and ckpt.nbytes == 24 + 8
    for name, t in tensors.items():
        assert torch.equal(ckpt.read(name), t)
    info = ckpt.tensors["a"]
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (2, 3), 24)
    with pytest.raises(CheckpointError, match=r"expected a tensor 'c'"):
        ckpt.read("c")


def index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "config.json").unlink(), r"config.json: no such file"),
        (lambda p: (p / "config.json").write_text("{"), r"config.json: cannot be read as JSON"),
        (lambda p: (p / "config.json").write_text("[]"), r"config.json: expected a JSON object"),
        (lambda p: (p / "b.safetensors").unlink(), r"b.safetensors: missing shard: .* tensor 'b'"),
        (
            lambda p: index(p, {"a": "a.safetensors", "c": "b.safetensors"}),
            r"b.safetensors: expected tensor 'c' as model.safetensors.index.json says",
        ),
        (lambda p: index(p, {"a": "../a.safetensors"}), r"weight_map: 'a': expected a file name"),
        (lambda p: index(p, []), r"index.json: weight_map: expected an object"),
        (
            lambda p: (p / "model.safetensors.index.json").rename(p / "pytorch_model.bin"),
            r"expected model.safetensors or .*; pytorch_model.bin is not safetensors",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, message):
    write(tmp_path, sharded=True)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1, -24])
def test_truncated_files_are_refused(tmp_path, keep):
    write(tmp_path, sharded=False)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    tensor = r".*tensor '(a|b)' ends at byte" if keep < 0 else ""
    with pytest.raises(CheckpointError, match=rf"model.safetensors: truncated: {tensor}"):
        Checkpoint.open(tmp_path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes((4).to_bytes(8, "little") + b"abcd")
    with pytest.raises(CheckpointError, match=r"x.safetensors: not a safetensors file"):
        read_header(file)
    file.write_bytes((8).to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(CheckpointError, match=r"x.safetensors: tensor 'a': damaged header entry"):
        read_header(file)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing: expected a folder"):
        Checkpoint.open(tmp_path / "nothing")


def test_recipes_pick_the_precision_of_a_layer():
    m = W4AxLinear.from_linear(nn.Linear(512, 16), Recipe("m", granularity="block", k8=0.3))
    assert m.k8 == 256
