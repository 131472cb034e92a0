"""The kernels compile for GPUs that this machine need not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "support" / "compile_kernels.py"
SMALLEST_SHARED_BYTES = 99 * 1024  # of the GPUs with compute capability 8.0 and above


def test_kernels_compile_to_binaries_that_use_the_hardware(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout.splitlines()[-1])
    fused = ["norm_kernel", "norm_kernel", "rotate_kernel", "gate_kernel", "likeliest_kernel", "patches_kernel"]
    attend, quantize = ["attend_kernel"], ["quantize_kernel"]
    expected = [*attend * 3, "join_kernel", *attend * 2, *quantize * 2, *fused * 2]
    assert [each["kernel"] for each in built] == expected
    for each in built:
        assert each["binary_bytes"] > 0
        assert each["shared_bytes"] <= SMALLEST_SHARED_BYTES
    for half in (*built[:2], *built[4:6]):
        assert half["tensor_core_products"] > 0
        assert half["wide_copies"] > 0
