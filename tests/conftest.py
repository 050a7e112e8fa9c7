"""One thread for all tests: on models this small, more only wait for each other."""

import torch

torch.set_num_threads(1)
