"""The compiled extension: which one is loaded, or why there is none."""

from .._build.library import cuda_enabled, cuda_kernel_why_not, cuda_why_not, load, path, record, why_not

__all__ = ["cuda_enabled", "cuda_kernel_why_not", "cuda_why_not", "load", "path", "record", "why_not"]
