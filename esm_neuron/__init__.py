"""Fine-tuning of ESM-2 protein language models on Trainium, CUDA, XLA devices and the CPU."""

__version__ = "0.1.0"
