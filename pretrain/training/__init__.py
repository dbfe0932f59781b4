"""The training loop and what it is made of: model, loss, optimizer, schedule, checkpoints."""
