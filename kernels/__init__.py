"""Triton kernels, one file an op: tensors in and out, no validation, no autograd."""
