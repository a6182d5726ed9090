"""Several processes as one, under torchrun; without it, everything behaves as for one process."""
import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm


def ranks():
    """(rank of this process, number of processes): (0, 1) unless torchrun started several."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def first():
    """Whether this is rank 0, the one that writes files and prints."""
    return ranks()[0] == 0


@contextlib.contextmanager
def together():
    """Meet the other ranks for this block: over gloo on CPUs, NCCL on GPUs. Rank 0 alone prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    cuda, stdout = torch.cuda.is_available(), sys.stdout
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # hours: rank 0 measures while the others wait
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                            timeout=datetime.timedelta(hours=4))
    if not first():
        sys.stdout = open(os.devnull, "w")
    try:
        yield
    finally:
        sys.stdout = stdout
    dist.destroy_process_group()


def over_ranks(value):
    """The sum of a number over all ranks."""
    if ranks()[1] == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def any_rank(flag):
    """Whether the flag is up on any rank."""
    return over_ranks(float(flag)) > 0


def wait_for_all():
    """Go on when every rank has come here: what rank 0 wrote before is there for all."""
    any_rank(False)


def gather(value):
    """[value of every rank]."""
    found = [value] * ranks()[1]
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def share(function, items, label=None):
    """[function(item) for item in items], each rank computing its share and having the whole."""
    rank, world = ranks()
    mine = items[rank::world]
    bar = tqdm(mine, desc=label, unit="batch", leave=False, mininterval=0.5,
               disable=True if rank or label is None else None)
    done = gather([function(item) for item in bar])
    return [done[i % world][i // world] for i in range(len(items))]


def share_rows(function, model, images, **options):
    """function(model, images, ...), a tuple of tensors, each rank computing a share of the rows."""
    parts = images.tensor_split(ranks()[1])
    found = share(lambda part: function(model, part, **options), parts)
    return tuple(torch.cat(pieces) for pieces in zip(*found))


def same_on_all(masks):
    """RuntimeError when the ranks have come to different packed masks (or None)."""
    found = gather({name: bits.numpy().tobytes() for name, bits in (masks or {}).items()})
    if any(other != found[0] for other in found):
        raise RuntimeError("the ranks have come to different masks: they do not share --out")
