"""Accelerate: `attach` around what `prepare` made; the same script runs under `accelerate launch` on many processes.

torchrun --standalone --nproc-per-node=2 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch.integrations.accelerate import attach

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
inputs = torch.randn(4096, 20)
targets = (inputs[:, :2].prod(1) > 0).long()
loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
network = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
loss_fn = torch.nn.CrossEntropyLoss()
model, optimizer, loader = accelerator.prepare(network, optimizer, loader)

limits = adabatch.Limits(min=32, max=512)  # of all ranks together
batches = attach(
    accelerator, model, optimizer, adabatch.NormTest(0.7), micro_batch_size=16, limits=limits, lr_rule="sqrt"
)
for epoch in range(6):
    for step in batches.steps(loader):
        for x, y in step:
            step.backward(loss_fn(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loss = loss_fn(network(inputs), targets).item()
    accelerator.print(f"epoch {epoch}: global batch {batches.plan.global_batch_size}, {loss=:.3f}")
accelerator.wait_for_everyone()
accelerator.end_training()
