"""What a model is worth: measures, and the folder that keeps them."""
