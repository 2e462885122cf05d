"""Training of any model, with distillation, pruning and falling ranks."""
