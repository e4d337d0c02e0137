"""Answers of a model for many proteins: predictions, embeddings and variant scores, by one streaming engine."""
