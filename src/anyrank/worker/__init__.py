"""A long-lived process that trains clients: base model, tokenizer and examples are loaded once. `python -m anyrank.worker`."""
