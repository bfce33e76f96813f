"""What stands around a user's model or backward: ``torch.compile``, FSDP2, Fabric, a gradient scaler."""
