"""Kernels: templates are importable Triton modules, bound to a `KernelSpec`, emitted as files and cached.

Importing this package imports neither triton nor torch.cuda; both are needed only where a kernel is loaded.
"""
