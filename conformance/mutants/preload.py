"""What every mutant's process needs and no mutant changes: imported once, before they are forked."""

import importlib

import torch

from .. import cell
from ..ops import operations

importlib.import_module("triton.runtime.interpreter")
torch.set_num_threads(1)
operations()
cell.prepare_worker()
