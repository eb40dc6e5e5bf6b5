"""Text encoders: a closed vocabulary of words, and UMT5 with its tokenizer and its cache of encoded prompts."""
