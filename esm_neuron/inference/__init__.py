"""Finished runs and plain ESM-2 models that answer: predict, embed, score, evaluate, export, serve."""
