"""Shared by all tests: one thread, since several test processes on two cores would otherwise fight for them."""

import torch

torch.set_num_threads(1)
