"""DistributedDataParallel: wrap the model as always, and give each rank its share of the data.

torchrun --standalone --nproc-per-node=2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import adabatch

dist.init_process_group("gloo")
torch.manual_seed(0)
inputs = torch.randn(4096, 20)
targets = (inputs[:, :2].prod(1) > 0).long()
dataset = TensorDataset(inputs, targets)
sampler: DistributedSampler[object] = DistributedSampler(
    dataset
)  # without it every rank would train on the same examples
loader = DataLoader(dataset, batch_size=16, sampler=sampler)
network = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
model = DistributedDataParallel(network)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loss_fn = torch.nn.CrossEntropyLoss()

batches = adabatch.AdaptiveBatch(
    model,
    optimizer,
    adabatch.NormTest(eta=0.7),
    micro_batch_size=16,
    limits=adabatch.Limits(min=32, max=512),  # of all ranks together
    lr_rule="sqrt",
)
with adabatch.Watchdog(batches, timeout=60):  # a rank that dies, hangs or raises is named on the others
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for step in batches.steps(loader):
            for x, y in step:
                step.backward(loss_fn(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            loss = loss_fn(network(inputs), targets).item()
            print(f"epoch {epoch}: global batch {batches.plan.global_batch_size}, {loss=:.3f}")
dist.destroy_process_group()
