"""One phase: from prompts and weights to scored micro-batches."""
