"""Use trained models: evaluate, predict, embed, score variants, export, serve."""
