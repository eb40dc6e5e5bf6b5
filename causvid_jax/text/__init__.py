"""Text encoders: words, tokenizer, UMT5 with its cache."""
