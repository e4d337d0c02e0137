"""ESM-2: the architecture, its weights, adapters, quantized linears, and how it is cut over devices."""
