"""Every architecture that TransformerLens loads, against Hugging Face's own model of it."""
