"""FSDP2: shard the model with ``fully_shard``; one order of the data for all ranks, so the micro-batch may grow too.

torchrun --standalone --nproc-per-node=2 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

import adabatch

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda" where there are GPUs
torch.manual_seed(0)
inputs = torch.randn(4096, 20)
targets = (inputs[:, :2].prod(1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loss_fn = torch.nn.CrossEntropyLoss()

total = adabatch.examples(12_000)
order = adabatch.GlobalOrder(TensorDataset(inputs, targets), seed=0)
batches = adabatch.AdaptiveBatch(
    model,
    optimizer,
    adabatch.NormTest(eta=0.7),
    micro_batch_size=16,
    max_micro_batch_size=128,
    limits=adabatch.Limits(min=32, max=512),  # of all ranks together
    lr_rule="sqrt",
)
schedule = adabatch.ProgressLR(optimizer, adabatch.lr.wsd(cooldown=0.2), batches, total=total)
for step in batches.steps(order, until=total):
    for x, y in step:
        step.backward(loss_fn(model(x), y))
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
loss = loss_fn(model(inputs), targets).item()  # on all ranks, which gather the weights together
if dist.get_rank() == 0:
    print(f"{batches.progress.steps} steps, global batch {batches.plan.global_batch_size}, {loss=:.3f}")
dist.destroy_process_group()
