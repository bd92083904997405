"""Losses, rows and loop to train checkpoints with, contrastive pre-training of an encoder, and evaluation on scenes."""
