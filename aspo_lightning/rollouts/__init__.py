"""One phase, an epoch's rollouts: from prompts and weights to scored micro-batches. Start reading at ``loop.py``."""
