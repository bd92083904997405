"""Drawn scenes with the truth about them: for the page's “New scene”, for tests, and for training and evaluating."""
