"""``vssm benchmark --profile``: where the time of a step goes."""

import json

import pytest
import torch

from vssm.cli import main
from vssm.engine.profile import part_of, profile_rows, profile_step

KERNELS = {
    "scan_adjoint_kernel": "scan",
    "unpack_kernel": "scan",
    "vssm::scan_backward": "scan",
    "attention_keys_kernel": "attention",
    "void flash_fwd_kernel<Traits>(Params)": "attention",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "products",
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT": "products",
    "conv_backward_kernel": "convolutions",
    "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>": "convolutions",
    "void at::native::vectorized_layer_norm_kernel<float, float>": "norms",
    "triton_per_fused__to_copy_add_convolution_native_layer_norm_3": "norms",
    "triton_poi_fused_convolution_silu_1": "elementwise and others",
    "triton_tem_fused_addmm_7": "products",
    "void at::native::multi_tensor_apply_kernel<FusedAdam>": "optimizer",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::vectorized_elementwise_kernel<4, gelu>": "elementwise and others",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_parts_are_told_by_names(kernel):
    assert part_of(kernel) == KERNELS[kernel]


def test_the_part_that_takes_the_time_comes_first(device):
    weight = torch.randn(1024, 1024, device=device)

    def call() -> None:
        torch.relu(weight @ weight)

    call()
    found = profile_step(call, device)
    assert next(iter(found["parts"])) == "products"
    assert list(found["parts"].values()) == sorted(found["parts"].values(), reverse=True)
    assert found["kernels"][0]["calls"] == 1
    assert sum(kernel["ms"] for kernel in found["kernels"]) <= sum(found["parts"].values()) * (1 + 1e-9)
    rows = profile_rows({"model": "any", "profile": found}, "profile")
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_command_tells_parts_of_both_steps(tmp_path, capsys):
    options = ["--device", "cpu", "--batch-size", "2", "--repeats", "3", "--warmup", "1", "--train", "--profile"]
    assert main(["benchmark", "test_vim", *options, "--results", str(tmp_path / "times.json")]) == 0
    (record,) = json.loads((tmp_path / "times.json").read_text())
    assert record["profile"]["parts"]["scan"] > 0
    assert record["train_profile"]["parts"]["optimizer"] > 0
    assert "training" in capsys.readouterr().out
