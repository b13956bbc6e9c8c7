"""Text in and out of a model: templates, tokenizers, detokenizing. No torch."""
