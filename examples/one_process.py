"""One process: your model, optimizer, loader and loop; the batch grows by accumulating more micro-batches.

python examples/one_process.py
"""

import torch

import adabatch

torch.manual_seed(0)
inputs = torch.randn(4096, 20)
targets = (inputs[:, :2].prod(1) > 0).long()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=16, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loss_fn = torch.nn.CrossEntropyLoss()

batches = adabatch.AdaptiveBatch(
    model,
    optimizer,
    adabatch.NormTest(eta=0.7),
    micro_batch_size=16,
    limits=adabatch.Limits(min=32, max=512),
    lr_rule="sqrt",
)
for epoch in range(3):
    for step in batches.steps(loader):
        for x, y in step:
            step.backward(loss_fn(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    loss = loss_fn(model(inputs), targets).item()
    size = batches.plan.global_batch_size
    print(f"epoch {epoch}: global batch {size}, noise scale {batches.noise_scale:.0f}, {loss=:.3f}")
