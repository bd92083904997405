"""Fine-tuning of checkpoints, contrastive learning of encoder and text tower, and how well either does."""
