"""CUDA: graphs to kernels of a grid of threads, kernels to PTX. See docs/cuda.md."""
