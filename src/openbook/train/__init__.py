"""Training: recipe, optimizers, schedule, loop, ledger."""
