"""Run by test_distributed.py in two processes: `python distributed_attention.py RANK FOLDER`. Writes FOLDER/RANK.json.

Each kind of parallel training takes the steps that one process takes on the whole batch, from the same start.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from _attention import MECHANISMS, E, draw
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import longattn

STEPS, WORLD, L = 3, 2, 21


def model(mechanism):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    made = nn.TransformerEncoder(layer, 2)
    longattn.replace_attention(made, mechanism, report=False)
    return made


def train(made, rows):
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for step in range(STEPS):
        x = draw(2 * WORLD, L, E, seed=step)[rows]
        padding = torch.arange(L) >= torch.tensor([[L], [5], [L], [17]])[rows]
        optimizer.zero_grad()
        made(x, src_key_padding_mask=padding)[~padding].square().sum().div(2).backward()
        optimizer.step()


def by_ddp(made, rank):
    parallel = DistributedDataParallel(made)
    train(parallel, slice(2 * rank, 2 * rank + 2))
    return made.state_dict()


def by_fsdp(made, rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in made.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    train(made, slice(2 * rank, 2 * rank + 2))
    return {
        name: x.full_tensor() if isinstance(x, torch.distributed.tensor.DTensor) else x
        for name, x in made.state_dict().items()
    }


def alone(made):
    """What averaged gradients of two halves are: those of the whole, over two."""
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for step in range(STEPS):
        x = draw(2 * WORLD, L, E, seed=step)
        padding = torch.arange(L) >= torch.tensor([[L], [5], [L], [17]])
        optimizer.zero_grad()
        made(x, src_key_padding_mask=padding)[~padding].square().sum().div(2 * WORLD).backward()
        optimizer.step()
    return made.state_dict()


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mechanisms = MECHANISMS | {"lsh that draws anew": longattn.LSH(n_hashes=1, chunk_size=4)}
    found = {}
    for name, mechanism in mechanisms.items():
        expected = alone(model(mechanism))
        for kind, train_in_parallel in (("ddp", by_ddp), ("fsdp", by_fsdp)):
            state = train_in_parallel(model(mechanism), rank)
            assert state.keys() == expected.keys()
            found[f"{kind} {name}"] = max((state[x] - expected[x]).abs().max().item() for x in expected)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(int(sys.argv[1]), sys.argv[2])
