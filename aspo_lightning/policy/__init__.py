"""The model that is trained: a Hugging Face causal LM that scores packed rows."""
