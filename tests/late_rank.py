"""Let rank 0 reach two barriers later than the timeout of torch's process group; only the second may time out."""

import datetime
import functools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

import utils

if __name__ == "__main__":
    limit = datetime.timedelta(seconds=2)
    dist.init_process_group = functools.partial(dist.init_process_group, timeout=limit)
    world = utils.init_distributed("cpu")
    late = 2 * limit.total_seconds() if world.rank == 0 else 0
    time.sleep(late)
    utils.barrier(is_long=True)
    time.sleep(late)
    try:
        utils.barrier()
    except RuntimeError:  # of both ranks: rank 1 has given up, and rank 0 misses it
        print("waited", flush=True)
    os._exit(0)  # the process group is broken
