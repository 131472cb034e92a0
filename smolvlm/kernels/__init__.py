"""Triton kernels for CUDA devices, each held by tests to a plain torch equivalent.

Triton comes with the CUDA builds of torch. Nothing outside this package imports it, and nothing imports this package
where torch's own operators are used. With TRITON_INTERPRET=1 the kernels run on a CPU, slowly.
"""
