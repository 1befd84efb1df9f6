"""What has to be settled before any test module is imported."""

import os

import torch

# Triton reads this once, when it is imported, whichever test does so first. Where there is no GPU its interpreter runs
# the kernels, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
