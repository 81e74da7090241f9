"""The parts models are built from: thin compositions of kernels over loaded weights."""
