"""Triton kernels run in Triton's interpreter where there is no GPU; it is chosen when a kernel's module is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
