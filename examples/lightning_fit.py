"""Lightning: one callback, and the module, the loader and the trainer stay as they are.

python examples/lightning_fit.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import adabatch
from adabatch.integrations.lightning import AdaptiveBatchCallback


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


torch.manual_seed(0)
inputs = torch.randn(4096, 20)
targets = (inputs[:, :2].prod(1) > 0).long()
loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
limits = adabatch.Limits(min=32, max=512)
adaptive = AdaptiveBatchCallback(adabatch.NormTest(0.7), micro_batch_size=16, limits=limits, lr_rule="sqrt")
model = Classifier()
trainer = Trainer(max_epochs=4, accelerator="cpu", callbacks=[adaptive], logger=False, enable_checkpointing=False)
trainer.fit(model, loader)
loss = torch.nn.functional.cross_entropy(model.network(inputs), targets).item()
print(f"{trainer.global_step} steps, global batch {adaptive.batches.plan.global_batch_size}, {loss=:.3f}")
