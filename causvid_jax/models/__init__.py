"""The networks: Wan transformer with three forward modes, Wan VAE, TAEHV, UMT5 text encoder and CLIP image encoder."""
