from pathlib import Path

import pytest
import torch

from smolvlm.precision import dtype_named, multiplies_bfloat16

CPU = torch.device("cpu")
CPU_FLAGS = Path("/proc/cpuinfo")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_name_is_its_dtype_wherever(name: str, device: str) -> None:
    assert dtype_named(name, torch.device(device)) == getattr(torch, name)


def test_auto_is_bfloat16_on_a_gpu() -> None:
    assert dtype_named("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(("found", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_follows_what_the_cpu_has(found: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: found)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert dtype_named("auto", CPU) == expected


@pytest.mark.skipif(not CPU_FLAGS.exists(), reason="needs /proc/cpuinfo, which tells what the CPU has")
def test_what_the_cpu_has_is_what_the_kernel_says() -> None:
    flags = set(CPU_FLAGS.read_text().split())
    assert multiplies_bfloat16(CPU) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'int4'; it must be one of auto, float32, bfloat16, float16"):
        dtype_named("int4", CPU)
