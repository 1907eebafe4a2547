"""Attention in Triton: its kernels equal their twins, compile for GPUs that are not here, and are refused elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ttt_e2e.attention import TWICE_DIFFERENTIABLE, inner_attention
from ttt_e2e.triton_attention import KERNELS, why_not

from .helpers import BATCH, random_ids, small_config, small_model

pytest.importorskip("triton", reason="Triton has no wheels for this machine")


def run_kernel_tests(*arguments, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    place = Path(__file__).with_name("triton_kernels.py")
    run = subprocess.run(
        [*command, str(place)], env=os.environ | environment, cwd=place.parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@pytest.mark.parametrize("some", [["-k", "shared or in_the_first"], pytest.param([], marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_their_twins(some):
    run_kernel_tests(*some, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled_kernels_equal_their_twins():
    run_kernel_tests()


def test_kernels_compile_for_ampere_and_hopper():
    from ttt_e2e.benchmarks.kernels import ARCHITECTURES, SHARED_LIMIT, compile_kernel

    for architecture in ARCHITECTURES:
        for name in KERNELS:
            compiled = compile_kernel(name, architecture, torch.bfloat16, 64)
            print(compiled)
            assert compiled.shared <= SHARED_LIMIT[architecture]
            assert compiled.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [72, 128, 256])
def test_kernels_compile_for_every_size_of_heads(channels, dtype):
    from ttt_e2e.benchmarks.kernels import SHARED_LIMIT, compile_all

    for compiled in compile_all((channels,), (dtype,)):
        print(compiled)
        assert compiled.shared <= SHARED_LIMIT[compiled.architecture]


def test_what_the_kernels_cannot_do_is_said_before_any_work():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="`inner_attention='triton'` cannot be used here: the device is 'cpu'"):
        small_model(inner_attention="triton")(random_ids(1, 3 * BATCH))
    assert "float64" in why_not(torch.device("cuda"), torch.float64, 64)
    assert "264 channels" in why_not(torch.device("cuda"), torch.bfloat16, 264)
    assert why_not(torch.device("cuda"), torch.bfloat16, 256) is None
    assert inner_attention(small_config(), cpu, torch.float32, differentiated=True) == TWICE_DIFFERENTIABLE
    with pytest.raises(ValueError, match="inner_attention"):
        small_config(inner_attention="cuda")


def test_the_saved_context_does_not_depend_on_what_computes_attention():
    settings = [small_config(inner_attention=name).context_settings() for name in ("torch", "triton")]
    assert settings[0] == settings[1]
