"""Train four steps on three ranks; repeat the last two from a restart; compare the weights."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch.nn.parallel import DistributedDataParallel

import engine
import samplers
import utils

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def steps(module, state_dict, first, last, rank):
    """Train these steps with a new optimizer and a new DDP, as after a restart; return the weights."""
    module.load_state_dict(state_dict)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    engine.settle_buckets(model, torch.zeros(2, 3, 32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(first, last):
        samplers.seed_generators(1000 * step + rank)
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy(module.state_dict())


if __name__ == "__main__":
    world = utils.init_distributed("cpu")
    samplers.seed_generators(0)
    module = timm.create_model("deit_tiny_distilled_patch16_224", **SHAPE)
    beginning = copy.deepcopy(module.state_dict())
    halfway = steps(module, beginning, 0, 2, world.rank)
    whole, resumed = steps(module, beginning, 0, 4, world.rank), steps(module, halfway, 2, 4, world.rank)
    same = all(torch.equal(whole[name], resumed[name]) for name in whole)
    print("equal" if same else "different", flush=True)
    utils.shut_down_distributed()
