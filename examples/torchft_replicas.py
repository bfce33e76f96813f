"""torchft: two replicas share every batch; one is killed in the middle of the run, and a spare takes its place.

python examples/torchft_replicas.py
"""

import multiprocessing
import time

import torch
import torchft
from torchft.coordination import LighthouseServer

import adabatch
from adabatch.integrations.torchft import attach


def train(name, address, may_start, steps):
    torch.manual_seed(0)
    inputs = torch.randn(4096, 20)
    targets = (inputs[:, :2].prod(1) > 0).long()
    order = adabatch.GlobalOrder(torch.utils.data.TensorDataset(inputs, targets))
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    may_start.wait()
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    own = {"replica_id": name, "rank": 0, "world_size": 1, "store_addr": "localhost", "store_port": store.port}
    own |= {"lighthouse_addr": address, "load_state_dict": None, "state_dict": None, "use_async_quorum": False}
    manager = torchft.Manager(torchft.ProcessGroupGloo(), min_replica_size=1, **own)
    manager.register_state_dict_fn("model", model.load_state_dict, model.state_dict)
    manager.register_state_dict_fn("optimizer", optimizer.load_state_dict, optimizer.state_dict)
    limits = adabatch.Limits(min=32, max=512)  # of all replicas together
    batches = attach(manager, model, optimizer, adabatch.NormTest(0.7), micro_batch_size=16, order=order, limits=limits)
    for step in batches.steps(order, until=adabatch.examples(25_000)):
        for x, y in step:
            step.backward(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        steps.value += 1
    loss = torch.nn.functional.cross_entropy(model(inputs), targets).item()
    print(f"{name}: {steps.value} steps, global batch {batches.plan.global_batch_size}, {loss=:.3f}", flush=True)
    manager.shutdown()


if __name__ == "__main__":
    new = multiprocessing.get_context("spawn")
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=1, heartbeat_timeout_ms=1000)
    shared = {name: (new.Event(), new.Value("i")) for name in ("replica 0", "replica 1", "spare")}
    jobs = [new.Process(target=train, args=(name, lighthouse.address(), *shared[name])) for name in shared]
    for job, (may_start, _) in zip(jobs, shared.values(), strict=True):
        job.start()
        if job is not jobs[2]:
            may_start.set()
    while shared["replica 1"][1].value < 20:
        time.sleep(0.01)
    jobs[1].kill()
    shared["spare"][0].set()
    for job in jobs:
        job.join()
    lighthouse.shutdown()
