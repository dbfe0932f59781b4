"""The training loop and its parts: model, losses, optimizers, schedules, checkpoints."""
