"""Local SGD: each worker steps on its own plain model, and all average their weights every eighth step.

torchrun --standalone --nproc-per-node=2 examples/local_sgd.py
"""

import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

import adabatch

dist.init_process_group("gloo")
torch.manual_seed(0)
inputs = torch.randn(4096, 20)
targets = (inputs[:, :2].prod(1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loss_fn = torch.nn.CrossEntropyLoss()

with adabatch.LocalSGD(model, optimizer, sync_every=8) as local:
    batches = adabatch.AdaptiveBatch(
        model,
        optimizer,
        adabatch.NormTest(eta=0.7),
        micro_batch_size=16,
        limits=adabatch.Limits(min=32, max=512),  # of all workers together
        local_sgd=local,
    )
    order = adabatch.GlobalOrder(TensorDataset(inputs, targets), seed=0)
    for step in batches.steps(order, until=adabatch.examples(12_000)):
        for x, y in step:
            step.backward(loss_fn(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    local.synchronize()  # what follows sees the average
loss = loss_fn(model(inputs), targets).item()
if dist.get_rank() == 0:
    print(f"{batches.progress.steps} steps, global batch {batches.plan.global_batch_size}, {loss=:.3f}")
dist.destroy_process_group()
