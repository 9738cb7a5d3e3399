"""Where weights come from: the embedded model, a local folder or the Hugging Face hub."""
