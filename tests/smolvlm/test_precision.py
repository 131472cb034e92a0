from pathlib import Path

import pytest
import torch

from smolvlm.precision import CPU_INFO, E4M3, cache_dtype_named, dtype_named, multiplies_bfloat16, to_e4m3

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_name_is_its_dtype_wherever(name: str, device: str) -> None:
    assert dtype_named(name, torch.device(device)) == getattr(torch, name)


def test_auto_is_bfloat16_on_a_gpu() -> None:
    assert dtype_named("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(
    ("maker", "vectors", "tiles", "expected"),
    [
        ("AuthenticAMD", False, False, torch.float32),
        ("AuthenticAMD", True, False, torch.bfloat16),
        ("GenuineIntel", True, False, torch.float32),
        ("GenuineIntel", True, True, torch.bfloat16),
    ],
)
def test_auto_follows_what_the_cpu_does_fast(
    maker: str, vectors: bool, tiles: bool, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr("smolvlm.precision.CPU_INFO", info)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: vectors)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: tiles)
    assert dtype_named("auto", CPU) == expected


@pytest.mark.skipif(not CPU_INFO.exists(), reason="needs /proc/cpuinfo, which tells what the CPU has")
def test_what_the_cpu_has_is_what_the_kernel_says() -> None:
    found = set(CPU_INFO.read_text().split())
    wanted = {"amx_bf16", "bf16"} | (set() if "GenuineIntel" in found else {"avx512_bf16"})
    assert multiplies_bfloat16(CPU) == bool(found & wanted)


def test_a_cache_holds_what_is_computed_or_8_bit_floats() -> None:
    assert cache_dtype_named("auto", torch.bfloat16, torch.device("meta")) == torch.bfloat16
    assert cache_dtype_named("fp8", torch.float32, CPU) == E4M3
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'fp4'; it must be 'auto' or 'fp8'"):
        cache_dtype_named("fp4", torch.float32, CPU)


@pytest.mark.parametrize(("capability", "found"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_have_8_bit_floats_from_ada_on(
    capability: tuple[int, int], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    if found:
        assert cache_dtype_named("fp8", torch.bfloat16, torch.device("cuda:1")) == E4M3
        return
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'fp8' and device 'cuda:1'; .* 8\.9 .*leave it out"):
        cache_dtype_named("fp8", torch.bfloat16, torch.device("cuda:1"))


def test_8_bit_floats_are_the_nearest_and_never_beyond_the_largest() -> None:
    values = torch.tensor([0.0, 1.06, 1.0625, 1.1875, -3.3, 2.0**-10, 2.0**-9, 447.0, 500.0, -1e9, torch.inf])
    rounded = [0.0, 1.0, 1.0, 1.25, -3.25, 0.0, 2.0**-9, 448.0, 448.0, -448.0, 448.0]
    assert to_e4m3(values).tolist() == rounded


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'int4'; it must be one of auto, float32, bfloat16, float16"):
        dtype_named("int4", CPU)
