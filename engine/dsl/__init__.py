"""CuTe-DSL kernels, compiled ahead of time to shared objects with the C ABI of the CUDA kernels."""
