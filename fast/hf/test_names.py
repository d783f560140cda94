"""Names and rows: what transformers' conversions do to tensors is done to quantized weights, and undone."""

import pytest
import torch

import ref
from ref.qtensor import equal

from .conftest import EXPERTS, plain_model
from .names import Names, gather

transformers = pytest.importorskip("transformers")
FORMATS = ("int4_g32", "uint3z_g32_fp16", "fp8_e4m3_b32x32", "fp8_e4m3_b24x32", "int8_tensor", "nvfp4")


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_are_gathered(fmt):
    torch.manual_seed(1)
    qs = [ref.quantize(torch.randn(n, 64), fmt) for n in (32, 64, 16)]
    whole = torch.cat([ref.dequantize(q) for q in qs])
    for rows in (torch.arange(112), torch.arange(32, 96), torch.arange(112).flip(0), torch.tensor([100, 3, 40, 3]), torch.arange(96, 112)):
        assert torch.equal(ref.dequantize(gather(qs, rows)), whole[rows])
    planes = torch.stack([torch.arange(0, 32), torch.arange(32, 64)])
    assert torch.equal(ref.dequantize(gather(qs, planes.unsqueeze(2))), whole[planes])
    assert torch.equal(ref.dequantize(gather(qs, planes.unsqueeze(1))), whole[planes])


def test_whole_weights_keep_their_format():
    qs = [ref.quantize(torch.randn(64, 64), "fp8_e4m3_b32x32") for _ in range(2)]
    assert equal(gather(qs, torch.arange(64, 128)), qs[1]) and equal(gather(qs, torch.arange(128)), ref.fuse(qs))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_weights_are_written_as_transformers_names_them_and_read_back(name, fmt):
    model = plain_model(name)
    names = Names(model)
    layer = 1
    key = f"model.layers.{layer}.mlp.experts.gate_up_proj"
    w = model.get_parameter(key).detach()
    w = w.mT if name == "gpt_oss" else w
    q = ref.fuse([ref.quantize(half, fmt) for half in w.chunk(2, 1)])
    written = names.write(key, q)
    assert len(written) == (1 if name == "gpt_oss" else 2 * EXPERTS)
    groups, left = names.groups(written)
    assert not left and [group.keys for group in groups] == [[key]]
    assert equal(names.read(groups[0], written)[key], q)
    if name != "gpt_oss":
        # As transformers saves the same tensors.
        dense = ref.dequantize(q)
        for i, (one, part) in enumerate(written.items()):
            expert, up = int(one.split(".")[-2]), one.endswith(("up_proj", "w3"))
            assert torch.equal(ref.dequantize(part), dense[expert].chunk(2)[up]), i
    if name == "mixtral":
        assert names.stored(["model.layers.0.mlp.experts.3.w1"]) == {
            "model.layers.0.mlp.experts.3.w1": "model.layers.0.block_sparse_moe.experts.3.w1"
        }


def test_what_cannot_be_joined():
    names = Names(plain_model("qwen3_moe"))
    experts = {
        f"model.layers.0.mlp.experts.{e}.{p}_proj": ref.quantize(torch.ones(32, 64), "int4_g32") for e in range(4) for p in ("gate", "up")
    }
    (group,), left = names.groups([*experts, "model.nowhere"])
    assert left == ["model.nowhere"]
    one = "model.layers.0.mlp.experts.2.up_proj"
    with pytest.raises(
        ValueError, match=r"experts\.2\.up_proj\.weight has shape \(16, 64\), and the first of .*up_proj\.weight \(32, 64\)"
    ):
        names.read(group, experts | {one: ref.quantize(torch.ones(16, 64), "int4_g32")})
    with pytest.raises(ValueError, match="formats"):
        names.read(group, experts | {one: ref.quantize(torch.ones(32, 64), "int8")})
    with pytest.raises(NotImplementedError, match="only weights"):
        names.read(group, experts | {one: ref.quantize(torch.ones(2, 32, 64), "int4_g32")})
    with pytest.raises(ValueError, match=r"q_proj and .*q_proj are both model\.layers\.0\.self_attn\.q_proj\.weight"):
        names.groups(["model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"])
