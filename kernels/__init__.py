"""Triton kernels: a file an op, tensors in and out, no autograd, no validation.

A launcher has the name and arguments of its op in fastgen.ops, and answers NotImplemented to what its kernels
do not serve. All take float32, bfloat16 and float16, compute in float32, and index with 64 bits. Products by
the matrix units are of TF32 where PyTorch allows it for float32, else of three TF32 terms.
"""
