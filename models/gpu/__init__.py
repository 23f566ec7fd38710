"""Operations that have a form of their own on a CUDA GPU, each exact, with torch's form beside it; the models choose by device.

A file is an operation of torch, which fake tensors and dispatch modes see; ``<name>_kernels`` beside it are its Triton kernels, imported
only where they run, through ``models.gpu.kernels``.
"""
