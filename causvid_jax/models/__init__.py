"""What the networks compute: the Wan DiT in three readings, the Wan VAE, text."""
