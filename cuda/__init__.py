"""Graphs for CUDA targets: compiling them, estimates of what kernels cost, folders of PTX for several SMs."""
