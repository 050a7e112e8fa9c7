"""Train a compiled EViT on two ranks, with several gradient buckets, while its keep rate falls; compare with eager.

With the argument `checkpointing`, blocks recompute their activations in the backward pass.
"""

import copy
import dataclasses
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import engine
import models_evit  # noqa: F401, registers the model
import samplers
import utils
from models_evit import KeepRate

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3, "num_classes": 10}
OPTIONS = engine.OptimizerOptions(opt="sgd", lr=0.01, lr_scaling="none", model_ema=False)


class SmallBuckets(DistributedDataParallel):
    def __init__(self, *args, **options):
        super().__init__(*args, bucket_cap_mb=1, **options)  # a block has 1.7 MiB of weights


def train(model, is_compiled, world):
    """Train four steps at three keep rates; return the weights and the number of gradient buckets."""
    options = dataclasses.replace(OPTIONS, compile=is_compiled)
    state = engine.build_state(model, model, options, 4 * world.size, (3, 32, 32), None, world)
    schedule = KeepRate([model], updates_per_epoch=1, start_epoch=1, epochs=2, steps=10)
    rates = set()
    for step in range(4):
        schedule.step_update(step)
        rates.add(schedule.value)
        samplers.seed_generators(1000 * step + world.rank)
        state.step(sum(output.square().mean() for output in state.model(torch.randn(4, 3, 32, 32))))
    assert len(rates) == 3, rates
    return model.state_dict(), len(state.model.reducer._get_zeros_like_grad_buckets())


if __name__ == "__main__":
    world = utils.init_distributed("cpu")
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # needs no C++ compiler
    engine.DistributedDataParallel = SmallBuckets
    samplers.seed_generators(0)
    model = timm.create_model("evit_tiny_distilled_patch16_224", drop_loc=(1,), keep_rate=0.5, **SHAPE)
    model.set_distilled_training(True)
    model.set_grad_checkpointing("checkpointing" in sys.argv)
    eager, _ = train(copy.deepcopy(model), False, world)
    compiled, buckets = train(model, True, world)
    assert buckets > 3, buckets
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=1e-5, rtol=1e-4)
    print("equal", flush=True)
    utils.shut_down_distributed()
