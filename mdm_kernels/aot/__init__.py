"""Kernels compiled ahead of time, without a GPU, and what they cost: python -m mdm_kernels.aot"""
