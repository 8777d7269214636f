import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported: kernels then run on the CPU, slowly

# tests are small: two threads that wait for each other take longer than one, and much longer on a busy computer
torch.set_num_threads(1)

settings.register_profile("default", deadline=None)  # the first example of a test may compile or load
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")  # --hypothesis-profile overrides it


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
