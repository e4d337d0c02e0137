"""The training loop and what stands around it: checkpoints, monitors, callbacks, the final evaluation."""
